/* A persistent team of threads that splits loops. The caller is a member, so a team of one starts no thread. */
#ifndef LH_TEAM_H
#define LH_TEAM_H

#include <stdint.h>

typedef struct team team;

/* One item of a loop. `member` is 0 .. size - 1 and names the thread, for its scratch memory only. */
typedef void (*loop_body)(void *arg, int64_t item, int member);

/* NULL when a thread cannot be started. */
team *team_new(int size);
void team_free(team *t);
int team_size(const team *t);

/* The item that this member runs after the one at hand, -1 when there is none: so that its memory can be fetched. */
int64_t team_next(const team *t, int member);

/* Runs body for every item in [0, items), each exactly once, on whichever member is free; returns when all are done. */
void team_for(team *t, int64_t items, loop_body body, void *arg);

#endif
