"""``phi3v chat``: one answer in the terminal, or a page in the browser."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from phi3v.config import PRECISIONS
from phi3v.errors import UserError
from phi3v.grammar import Parser
from phi3v.serve.limits import Limits, limit_option
from phi3v.terminal import say

if TYPE_CHECKING:
    from phi3v.serve.conversation import AnswerSettings, Chat, Which


def add_commands(verbs: Parser) -> None:
    command = verbs.add_command(
        "chat",
        chat,
        "ask a model, an adapter or a run about images and clips, in the browser or once with --prompt",
        'phi3v chat output/first --prompt "What is the total?" --image page.png',
        brief="ask a model about images and clips",
    )
    command.add_argument("model", metavar="MODEL_OR_RUN", help="a model folder, a hub id, an adapter or a run folder")
    command.add_argument(
        "--model",
        "--base",
        dest="base",
        metavar="MODEL",
        help="the model to compare with; for an adapter, its base model (default: the base model of the run)",
    )
    command.add_argument("--compare", action="store_true", help="also ask the base model")
    command.add_argument("--precision", choices=PRECISIONS, help="precision of computation (default: as in the run)")
    once = command.add_argument_group("one answer in the terminal")
    once.add_argument("--prompt", metavar="TEXT", help="the question")
    for option, what in (("--image", "images"), ("--video", "clips")):
        once.add_argument(
            option, dest="media", type=Path, nargs="+", action="extend", metavar="FILE", help=f"{what}; may be repeated"
        )
    how = command.add_argument_group("answers; initial settings in the browser")
    how.add_argument(
        "--system", metavar="TEXT", help="a system message, as in the records that it was trained on (default: none)"
    )
    how.add_argument("--frames", type=int, default=8, metavar="N", help="number of frames taken from a clip")
    how.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="maximum tokens of an answer")
    how.add_argument("--temperature", type=float, default=0.0, metavar="T", help="sampling temperature; 0: greedy")
    how.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens with this total probability",
    )
    how.add_argument("--seed", type=int, default=0, help="seed of sampling")
    how.add_argument("--num-crops", type=int, metavar="N", help="maximum number of crops per image (default: as saved)")
    most = command.add_argument_group("limits, also in the browser")
    for entry in dataclasses.fields(Limits):
        text = f"{entry.metadata['help']} (default: {entry.default:,})"
        most.add_argument(
            limit_option(entry.name), type=type(entry.default), default=entry.default, metavar="N", help=text
        )
    page = command.add_argument_group("the browser page (extra serve)")
    page.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; any but this machine's own needs a password"
    )
    page.add_argument("--port", type=int, default=7860, help="port, or the next free one")
    page.add_argument(
        "--share", action="store_true", help="also make it reachable through Gradio's public tunnel; needs a password"
    )
    page.add_argument(
        "--password",
        default=os.environ.get("PHI3V_PASSWORD"),
        help="required to open the page, with the user name phi3v (default: $PHI3V_PASSWORD)",
    )


def chat(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    from phi3v.evaluate.sampling import Sampling
    from phi3v.serve.conversation import AnswerSettings

    limits = Limits(**{entry.name: getattr(arguments, f"max_{entry.name}") for entry in dataclasses.fields(Limits)})
    sampling = Sampling(arguments.temperature, arguments.top_p, arguments.seed)
    settings = AnswerSettings(arguments.max_new_tokens, sampling, arguments.num_crops)
    if arguments.prompt is not None:
        return _answer_once(arguments, console, settings, limits)
    if arguments.media:
        raise UserError("an image without a question", where="--image", hint='ask with --prompt "…"')
    return _open_page(arguments, console, settings, limits)


def _load_chat(arguments: argparse.Namespace, console: Console, limits: Limits) -> Chat:
    """The model; shows what it is and where it runs.

    Raises:
        UserError: there is no such model, or it cannot be loaded here.
    """
    from phi3v.serve.conversation import Chat
    from phi3v.train.device import choose_device
    from phi3v.train.finetuned import described, resolve_model

    base = arguments.base
    tuned = resolve_model(arguments.model, base)
    runtime = choose_device(arguments.precision or tuned.run.training.precision)
    system, num_crops = arguments.system, arguments.num_crops
    chat = Chat(tuned, runtime, base=base, num_crops=num_crops, system=system, limits=limits)
    adapter = f" with the adapter {tuned.adapter}" if tuned.adapter is not None else ""
    say(console, f"asking {chat.tuned.base}{adapter}{', in 4 bits as it was trained' * tuned.is_quantised}")
    say(console, described(tuned, runtime))
    if arguments.compare and not chat.can_compare:
        raise UserError("there is no model to compare with", where="--compare", hint="name it with --model")
    return chat


def _answer_once(
    arguments: argparse.Namespace, console: Console, settings: AnswerSettings, limits: Limits
) -> dict[str, Any]:
    """Answer one question on standard output, on a terminal as it comes, and with ``--compare`` the base's too."""
    from phi3v.serve.conversation import Turn
    from phi3v.serve.media import read_media
    from phi3v.train.finetuned import resolve_model

    name, prompt, media, compare = arguments.model, arguments.prompt, arguments.media or [], arguments.compare
    if not prompt.strip():
        raise UserError("the question is empty", where="--prompt")
    limits.require_text(prompt)
    applied = not media or resolve_model(name, arguments.base).run.data.exif_orientation
    read = read_media(media, frames=arguments.frames, limits=limits, exif_orientation=applied)
    images = tuple(image for each in read for image in each.images)
    limits.require_images(len(images))
    turn = Turn(prompt, images)
    notes = Console(stderr=True, quiet=console.quiet)  # the answer is alone on standard output
    model = _load_chat(arguments, notes, limits)
    stream = not arguments.json
    as_it_comes = stream and sys.stdout.isatty()
    answers: dict[Which, str] = {}
    order: tuple[Which, ...] = ("tuned", "base") if compare else ("tuned",)
    for which in order:
        if compare and stream:
            print(f"{which}: ", end="", flush=True)
        for text in model.answer([turn], settings, which):
            if as_it_comes:
                # What came before stays, but for a character that was not finished.
                print(text[len(answers.get(which, "")) :], end="", flush=True)
            answers[which] = text
        if stream:
            print("" if as_it_comes else answers[which], flush=True)
            if not answers[which].strip():
                say(notes, "(an empty answer)")
            if which in turn.cut:
                say(notes, f"(cut at {turn.cut[which]:,} tokens; --max-new-tokens allows more)")
    result = {"model": name, "prompt": prompt, "answer": answers["tuned"], "cut": "tuned" in turn.cut}
    result["images"] = len(images)
    return result | ({"base_answer": answers["base"], "base_cut": "base" in turn.cut} if compare else {})


def _open_page(
    arguments: argparse.Namespace, console: Console, settings: AnswerSettings, limits: Limits
) -> dict[str, Any]:
    """Serve the page until Ctrl-C."""
    from phi3v.serve.address import Address
    from phi3v.serve.examples import find_examples

    address = Address(arguments.host, arguments.port, share=arguments.share, password=arguments.password)
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs gradio", where="phi3v chat", hint='pip install "phi3v[serve]"')
    from phi3v.serve.server import serve

    model = _load_chat(arguments, console, limits)
    # A terminal that closes or a service manager ends it with SIGTERM; the page's files are removed then too.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    with serve(
        model,
        address,
        title=arguments.model,
        settings=settings,
        frames=arguments.frames,
        compare=arguments.compare,
        examples=find_examples(model.tuned),
    ) as page:
        if page.port != address.port:
            say(console, f"port {address.port} is taken, so it is {page.port}")
        if not model.can_compare:
            say(console, "no model to compare with is known; --model names one")
        for url in page.urls:
            say(console, f"open {url}")
        say(console, "Ctrl-C ends it")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            say(console, "\nended")
    return {"model": arguments.model, "urls": page.urls}
