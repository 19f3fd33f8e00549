"""``phi3v chat``: the model loaded, then one answer in the terminal or the page in the browser."""

from __future__ import annotations

import importlib.util
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from phi3v.config import Precision
from phi3v.errors import UserError
from phi3v.serve.address import Address
from phi3v.serve.conversation import AnswerSettings, Chat, Turn, Which
from phi3v.serve.examples import find_examples
from phi3v.serve.limits import LIMITS, Limits
from phi3v.serve.media import read_media
from phi3v.train.device import choose_device
from phi3v.train.finetuned import resolve_model


def load_chat(
    name: str,
    console: Console,
    *,
    base: str | None,
    precision: Precision | None,
    num_crops: int | None,
    system: str | None,
    limits: Limits,
) -> Chat:
    """The model that is asked; says what it is and where it runs.

    Args:
        name: a model folder, a hub id, an adapter or a run folder.
        base: what it was tuned from and is compared with, in place of what adapter or run say.
        precision: arithmetic; by default the run's own.
        num_crops: crops of a picture at most; by default as the model was saved.
        system: the system message of every conversation.

    Raises:
        UserError: there is no such model, or it cannot be loaded here.
    """
    tuned = resolve_model(name, base)
    compute = choose_device(precision or tuned.run.training.precision)
    chat = Chat(tuned, compute, base=base, num_crops=num_crops, system=system, limits=limits)
    adapter = f" with the adapter {tuned.adapter}" if tuned.adapter is not None else ""
    for line in (
        f"[bold]asking[/bold] {chat.tuned.base}{adapter}{', in 4 bits as it was trained' * tuned.is_quantised}",
        f"device: {compute.device}, {compute.precision} ({compute.reason})",
    ):
        console.print(line, highlight=False, soft_wrap=True)
    return chat


def answer_once(
    name: str,
    prompt: str,
    media: Sequence[Path],
    console: Console,
    *,
    base: str | None = None,
    precision: Precision | None = None,
    num_crops: int | None = None,
    system: str | None = None,
    compare: bool = False,
    frames: int,
    settings: AnswerSettings,
    limits: Limits = LIMITS,
    stream: bool = True,
) -> dict[str, Any]:
    """Answer one question, and with ``compare`` the base's answer too.

    Args:
        media: pictures and clips, in their order.
        stream: write the answer to standard output, on a terminal as it comes.

    Returns:
        ``answer``, ``cut`` (it reached the limit of tokens before its end), ``images`` (pictures and frames that it
        saw), and with ``compare`` ``base_answer`` and ``base_cut``.

    Raises:
        UserError: the model or a file cannot be used.
    """
    if not prompt.strip():
        raise UserError("the question is empty", where="--prompt")
    limits.require_text(prompt)
    applied = not media or resolve_model(name, base).run.data.exif_orientation
    read = read_media(media, frames=frames, limits=limits, exif_orientation=applied)
    pictures = tuple(image for each in read for image in each.images)
    limits.require_images(len(pictures))
    turn = Turn(prompt, pictures)
    quiet = Console(stderr=True, quiet=console.quiet)  # the answer is alone on standard output
    chat = load_chat(name, quiet, base=base, precision=precision, num_crops=num_crops, system=system, limits=limits)
    if compare:
        _require_base(chat)
    answers: dict[Which, str] = {}
    order: tuple[Which, ...] = ("tuned", "base") if compare else ("tuned",)
    for which in order:
        if compare and stream:
            print(f"{which}: ", end="", flush=True)
        for text in chat.answer([turn], settings, which):
            if stream and sys.stdout.isatty():
                # What was a prefix stays one, but for a character that was not finished.
                print(text[len(answers.get(which, "")) :], end="", flush=True)
            answers[which] = text
        if stream:
            print("" if sys.stdout.isatty() else answers[which], flush=True)
            if not answers[which].strip():
                quiet.print("(an empty answer)")
            if which in turn.cut:
                quiet.print(f"(cut at {turn.cut[which]:,} tokens; --max-new-tokens allows more)", highlight=False)
    result = {"answer": answers["tuned"], "cut": "tuned" in turn.cut, "images": len(pictures)}
    return result | ({"base_answer": answers["base"], "base_cut": "base" in turn.cut} if compare else {})


def open_page(
    name: str,
    console: Console,
    address: Address,
    *,
    base: str | None = None,
    precision: Precision | None = None,
    num_crops: int | None = None,
    system: str | None = None,
    compare: bool = False,
    frames: int,
    settings: AnswerSettings,
    limits: Limits = LIMITS,
) -> dict[str, Any]:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: the model cannot be used, Gradio is missing, or the page cannot be served there.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs gradio", where="phi3v chat", hint='pip install "phi3v[serve]"')
    from phi3v.serve.server import serve

    chat = load_chat(name, console, base=base, precision=precision, num_crops=num_crops, system=system, limits=limits)
    if compare:
        _require_base(chat)
    examples = find_examples(chat.tuned)
    # Ended by its terminal or a service manager, it still takes its files along.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    with serve(chat, address, title=name, settings=settings, frames=frames, compare=compare, examples=examples) as page:
        if page.port != address.port:
            console.print(f"port {address.port} is taken, so it is {page.port}", highlight=False)
        if not chat.can_compare:
            console.print("no model to compare with is known; --model names one", highlight=False)
        for url in page.urls:
            console.print(f"open [bold]{url}[/bold]", highlight=False, soft_wrap=True)
        console.print("Ctrl-C ends it", highlight=False)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            console.print("\nended", highlight=False)
    return {"model": name, "urls": page.urls}


def _require_base(chat: Chat) -> None:
    if not chat.can_compare:
        raise UserError("there is no model to compare with", where="--compare", hint="name it with --model")
