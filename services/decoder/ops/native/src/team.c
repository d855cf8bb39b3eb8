#include "team.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define cpu_relax() _mm_pause()
#elif defined(__aarch64__)
#define cpu_relax() __asm__ __volatile__("yield")
#else
#define cpu_relax() ((void)0)
#endif

/* Less than a millisecond: longer than the gap between two steps, much shorter than an idle engine's wait. Who spins offers its
 * processor to others again and again: the threads that serve streams, or a member of this team that has work. */
enum { SPINS = 20000, SPINS_A_YIELD = 50, CACHE_LINE = 64 };

static inline void spin(int i) {
    if (i % SPINS_A_YIELD == SPINS_A_YIELD - 1) {
        sched_yield();
    } else {
        cpu_relax();
    }
}

typedef struct {
    struct team *team;
    int member;
    _Alignas(CACHE_LINE) int64_t next; /* what it runs after the item at hand, or -1 */
} worker;

struct team {
    int size;
    pthread_t *threads;
    worker *workers;
    int started;
    /* The loop at hand: written by the caller before `round` goes up, read by workers after. */
    loop_body body;
    void *arg;
    int64_t items;
    bool stop;
    pthread_mutex_t lock; /* guards sleeping, not the loop */
    pthread_cond_t wake, done;
    _Alignas(CACHE_LINE) atomic_uint round;
    atomic_int sleepers;
    _Alignas(CACHE_LINE) atomic_llong next;
    _Alignas(CACHE_LINE) atomic_int working;
    atomic_int caller_sleeps;
};

static int64_t claim(team *t) { return atomic_fetch_add_explicit(&t->next, 1, memory_order_relaxed); }

static void take_items(team *t, int member) {
    loop_body body = t->body;
    void *arg = t->arg;
    int64_t items = t->items, item = claim(t);
    while (item < items) {
        int64_t next = claim(t); /* one early, so that the body can know it */
        t->workers[member].next = next < items ? next : -1;
        body(arg, item, member);
        item = next;
    }
}

/* Waits for a round other than `seen`: spins, then sleeps. */
static unsigned await_round(team *t, unsigned seen) {
    for (int i = 0; i < SPINS; i++) {
        unsigned now = atomic_load_explicit(&t->round, memory_order_acquire);
        if (now != seen) return now;
        spin(i);
    }
    pthread_mutex_lock(&t->lock);
    atomic_fetch_add(&t->sleepers, 1);
    unsigned now;
    while ((now = atomic_load(&t->round)) == seen) pthread_cond_wait(&t->wake, &t->lock);
    atomic_fetch_sub(&t->sleepers, 1);
    pthread_mutex_unlock(&t->lock);
    return now;
}

static void report_done(team *t) {
    if (atomic_fetch_sub(&t->working, 1) != 1) return;
    if (!atomic_load(&t->caller_sleeps)) return;
    pthread_mutex_lock(&t->lock);
    pthread_cond_signal(&t->done);
    pthread_mutex_unlock(&t->lock);
}

static void await_done(team *t) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&t->working, memory_order_acquire) == 0) return;
        spin(i);
    }
    pthread_mutex_lock(&t->lock);
    atomic_store(&t->caller_sleeps, 1);
    while (atomic_load(&t->working) != 0) pthread_cond_wait(&t->done, &t->lock);
    atomic_store(&t->caller_sleeps, 0);
    pthread_mutex_unlock(&t->lock);
}

static void start_round(team *t) {
    atomic_fetch_add(&t->round, 1);
    /* A worker counts itself as a sleeper before it looks at `round` again, so one of the two is always seen. */
    if (atomic_load(&t->sleepers) == 0) return;
    pthread_mutex_lock(&t->lock);
    pthread_cond_broadcast(&t->wake);
    pthread_mutex_unlock(&t->lock);
}

static void *worker_main(void *p) {
    worker *w = p;
    team *t = w->team;
    unsigned seen = 0;
    for (;;) {
        seen = await_round(t, seen);
        if (t->stop) return NULL;
        take_items(t, w->member);
        report_done(t);
    }
}

team *team_new(int size) {
    if (size < 1) size = 1;
    team *t = aligned_alloc(CACHE_LINE, (sizeof *t + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE);
    if (!t) return NULL;
    *t = (team){.size = size};
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->wake, NULL);
    pthread_cond_init(&t->done, NULL);
    t->threads = calloc(size, sizeof *t->threads);
    t->workers = aligned_alloc(CACHE_LINE, size * sizeof *t->workers);
    for (int i = 1; t->threads && t->workers && i < size; i++) {
        t->workers[i] = (worker){t, i, -1};
        if (pthread_create(&t->threads[i], NULL, worker_main, &t->workers[i])) break;
        t->started = i;
    }
    if (t->started == size - 1 && t->threads && t->workers) return t;
    team_free(t);
    return NULL;
}

void team_free(team *t) {
    if (!t) return;
    t->stop = true;
    start_round(t);
    for (int i = 1; i <= t->started; i++) pthread_join(t->threads[i], NULL);
    pthread_cond_destroy(&t->done);
    pthread_cond_destroy(&t->wake);
    pthread_mutex_destroy(&t->lock);
    free(t->threads);
    free(t->workers);
    free(t);
}

int team_size(const team *t) { return t->size; }

int64_t team_next(const team *t, int member) { return t->workers[member].next; }

void team_for(team *t, int64_t items, loop_body body, void *arg) {
    if (t->size == 1 || items <= 1) {
        for (int64_t i = 0; i < items; i++) {
            t->workers[0].next = i + 1 < items ? i + 1 : -1;
            body(arg, i, 0);
        }
        return;
    }
    t->body = body;
    t->arg = arg;
    t->items = items;
    atomic_store_explicit(&t->next, 0, memory_order_relaxed);
    atomic_store_explicit(&t->working, t->started, memory_order_relaxed);
    start_round(t);
    take_items(t, 0);
    await_done(t);
}
