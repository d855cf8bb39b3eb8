"""From command-line values to the messages of the Decoder service."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from protos import decoder_pb2 as pb


def sampling_params(args: argparse.Namespace, seed: int) -> pb.SamplingParams:
    """The sampling flags as a message; what was not given stays absent."""
    return pb.SamplingParams(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p, seed=seed
    )


def generate_request(args: argparse.Namespace, seed: int, has_chat_template: bool) -> pb.GenerateRequest:
    """The request of `leasehold generate`."""
    request = pb.GenerateRequest(
        sampling=sampling_params(args, seed),
        stop=pb.StopConditions(max_tokens=args.max_tokens, strings=args.stop, ignore_eos=args.ignore_eos),
        logprobs=args.logprobs,
        n=args.n,
    )
    if args.token_ids is not None:
        request.token_ids.ids.extend(args.token_ids)
    elif has_chat_template:
        request.chat.CopyFrom(chat([("user", args.prompt)]))
    else:
        request.text = args.prompt
    return request


def chat(messages: Sequence[tuple[str, str]]) -> pb.Chat:
    """A conversation of (role, content) pairs."""
    return pb.Chat(messages=[pb.ChatMessage(role=role, content=content) for role, content in messages])
