"""The chat page: what stands on it, and what its buttons do.

The conversation is kept on the server. What a browser sends is a question with files that it has uploaded, and
settings; earlier turns are never read back from it.
"""

from __future__ import annotations

import contextlib
import html
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from phi3v.data.image_store import FolderStore
from phi3v.data.images import read_image
from phi3v.errors import UserError
from phi3v.evaluate.sampling import Sampling
from phi3v.serve.conversation import AnswerSettings, Chat, Turn, Which
from phi3v.serve.examples import Example
from phi3v.serve.media import Media, read_media

logger = logging.getLogger("phi3v")

SHOWN_EVERY = 0.05  # seconds between two sights of a growing answer
SHOWN_SIDE = 768  # pixels of an image as it is shown; the model gets the original
SHEET_COLUMNS = 4

CSS = """
.gradio-container, .gradio-container > main { width: 100%; max-width: 1240px !important; margin: 0 auto !important; }
.chat .message img { max-height: 280px; width: auto; border-radius: 6px; }
.chat [aria-label="Share"], .chat [aria-label="Download"], .chat .message-buttons-right { display: none; }
#offers .gallery-item img { height: 56px; width: auto; }
#head { padding: 0; }
#head h1 { font-size: 1.3rem; margin: 0; }
#head p { margin: .1rem 0 0; opacity: .75; font-size: .9rem; }
"""

# Fonts of the system: the page asks no other server for anything.
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


@dataclass
class Session:
    """One browser tab's conversation: the turns as the model reads them, and their images as they are shown."""

    turns: list[Turn] = field(default_factory=list)
    shown: list[list[dict[str, Any]]] = field(default_factory=list)

    def messages(self, which: Which) -> list[dict[str, Any]]:
        """The conversation with one of the models, as Gradio's Chatbot takes it."""
        messages: list[dict[str, Any]] = []
        for turn, images in zip(self.turns, self.shown, strict=True):
            question = [{"type": "text", "text": turn.text}] if turn.text else []
            messages.append({"role": "user", "content": [*images, *question]})
            if which in turn.answers:
                answer = turn.answers[which] or "(an empty answer)"
                content = [{"type": "text", "text": answer}]
                if which in turn.cut:
                    cut = f"(cut at {turn.cut[which]:,} tokens; Settings allow more)"
                    content.append({"type": "text", "text": cut})
                messages.append({"role": "assistant", "content": content})
        return messages


def theme() -> Any:
    """Gradio's theme with the system's fonts."""
    return gr.themes.Soft(primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=SANS, font_mono=MONO)


def build_page(
    chat: Chat,
    *,
    title: str,
    settings: AnswerSettings,
    frames: int,
    compare: bool,
    examples: Sequence[Example],
    folder: Path,
) -> Any:
    """The page as Gradio ``Blocks``, not launched.

    Args:
        title: the model as people call it.
        settings: what is set first, as are ``frames`` (of a clip) and ``compare``.
        folder: for images as they are shown, below Gradio's own; whoever may see the page may read what lies in it.
    """
    asker = _Asker(chat, folder)
    with gr.Blocks(title=f"{title} · phi3v", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        session = gr.State(Session(), time_to_live=3600)
        gr.HTML(_head(chat, title), elem_id="head")
        with gr.Row(equal_height=True):
            tuned = _chatbot("tuned" if chat.can_compare else "answers", "tuned")
            base = _chatbot("base", "base", visible=compare)
        box = gr.MultimodalTextbox(
            show_label=False,
            placeholder="Ask about an image, several, or a clip: drop the files here",
            file_count="multiple",
            file_types=["image", "video"],
            sources=["upload"],
            max_plain_text_length=chat.limits.characters,
            autofocus=True,
            elem_id="question",
        )
        offers = _offers(examples, folder)
        if offers:
            gr.Examples(
                offers,
                [box],
                label="Questions that the run was evaluated on",
                elem_id="offers",
                cache_examples=False,
                api_visibility="private",
            )
        both = gr.Checkbox(compare, label="Compare with the base", visible=chat.can_compare, elem_id="compare")
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            crops_now = settings.num_crops or chat.default_num_crops
            with gr.Row():
                longest = settings.max_new_tokens
                tokens = _slider("Longest answer", "in tokens", longest, 1, max(2048, longest))
                temperature = _slider(
                    "Temperature", "0: always the likeliest", settings.sampling.temperature, 0, 2, step=0.05
                )
                top_p = _slider("Top-p", "of a draw", settings.sampling.top_p, 0.05, 1, step=0.05)
            with gr.Row():
                crops = _slider("Crops of an image", "fewer are faster", crops_now, 1, max(16, chat.default_num_crops))
                clip_frames = _slider("Frames of a clip", "evenly spaced", frames, 1, chat.limits.frames)
                seed = gr.Number(
                    settings.sampling.seed, precision=0, label="Seed", info="of the draws", minimum=0, min_width=220
                )

        # No API is offered beside the page.
        own: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        asked = box.submit(asker.ask, [box, session, clip_frames], [box, session, tuned, base], **own)
        answered = asked.success(
            asker.answer,
            [session, both, tokens, temperature, top_p, seed, crops],
            [session, tuned, base],
            concurrency_limit=1,
            concurrency_id="model",
            **own,
        )
        answered.then(_ready, None, [box], **own)
        box.stop(_ready, None, [box], cancels=[answered], **own)
        for event in (tuned.clear, base.clear, both.change):  # Gradio puts the button into each conversation's corner
            event(
                lambda compare: (_ready(), Session(), [], gr.update(value=[], visible=compare)),
                [both],
                [box, session, tuned, base],
                cancels=[answered],
                **own,
            )
    return page


class _Asker:
    """What happens to a question."""

    def __init__(self, chat: Chat, folder: Path) -> None:
        self.chat = chat
        self.folder = folder
        self.count = 0

    def ask(self, message: dict[str, Any], session: Session, frames: float) -> tuple[Any, ...]:
        """Take the question into the conversation."""
        with _errors_on_the_page():
            text = (message.get("text") or "").strip()
            files = [Path(name) for name in message.get("files") or []]
            if not text:
                raise UserError("Ask something" + (" about what you gave" if files else ""))
            before = sum(image.width * image.height for turn in session.turns for image in turn.images)
            media = read_media(
                files,
                frames=int(frames),
                limits=self.chat.limits,
                pixels_before=before,
                exif_orientation=self.chat.tuned.run.data.exif_orientation,
            )
            images = tuple(image for each in media for image in each.images)
            session.turns.append(Turn(text, images))
            session.shown.append([self._show(each) for each in media])
        waiting = gr.update(value=None, submit_btn=False, stop_btn=True)
        return waiting, session, session.messages("tuned"), session.messages("base")

    def answer(
        self,
        session: Session,
        compare: bool,
        tokens: float,
        temperature: float,
        top_p: float,
        seed: float,
        crops: float,
    ) -> Iterator[tuple[Any, ...]]:
        """Let the answers grow, the tuned model's first."""

        def seen() -> tuple[Any, ...]:
            return session, session.messages("tuned"), session.messages("base")

        turn = session.turns[-1]
        try:
            with _errors_on_the_page():
                settings = AnswerSettings(int(tokens), Sampling(temperature, top_p, int(seed)), int(crops))
                last = 0.0
                order: tuple[Which, ...] = ("tuned", "base") if compare else ("tuned",)
                for which in order:
                    for text in self.chat.answer(session.turns, settings, which):
                        turn.answers[which] = text
                        if time.monotonic() - last >= SHOWN_EVERY:
                            last = time.monotonic()
                            yield seen()
        except gr.Error:
            if session.turns and session.turns[-1] is turn and not turn.answers:
                session.turns.pop()  # the next question does not come after one that was not answered
                session.shown.pop()
            yield seen()
            raise
        yield seen()

    def _show(self, media: Media) -> dict[str, Any]:
        """An image, or the frames of a clip side by side, small enough for a browser."""
        image = _contact_sheet(media.images) if media.is_clip else _small(media.images[0], SHOWN_SIDE)
        self.count += 1
        path = self.folder / f"shown-{self.count}.jpg"
        image.save(path, quality=85)
        alt = f"{len(media.images)} frames of {media.name}" if media.is_clip else media.name
        return {"path": str(path), "alt_text": alt}


@contextlib.contextmanager
def _errors_on_the_page() -> Iterator[None]:
    """Turn errors into short messages on the page; faults of ours also go to the terminal's log."""
    try:
        yield
    except gr.Error:
        raise
    except UserError as error:
        where = f"{error.where} " if error.where else ""
        hint = f": {error.hint}" if error.hint else ""
        raise _error(f"{where}{error.what}{hint}") from None
    except torch.OutOfMemoryError:
        raise _error("The device has too little memory: give fewer images, or allow fewer crops") from None
    except Exception as error:
        logger.error("the chat page failed", exc_info=error)
        raise _error("Something went wrong here; the terminal of the server says what") from None


def _error(message: str) -> Any:
    return gr.Error(html.escape(message), duration=10, print_exception=False, title="Not answered")


def _ready() -> Any:
    return gr.update(submit_btn=True, stop_btn=False)


def _slider(label: str, info: str, value: float, low: float, high: float, *, step: float = 1) -> Any:
    return gr.Slider(low, high, value, step=step, label=label, info=info, min_width=220)


def _chatbot(label: str, name: str, *, visible: bool = True) -> Any:
    return gr.Chatbot(
        label=label,
        height="46vh",
        min_height=300,
        visible=visible,
        elem_id=name,
        elem_classes="chat",
        # Plain text, as it was written: Markdown could show what is not there, or load images from elsewhere.
        render_markdown=False,
        buttons=["copy"],
        feedback_options=None,
        placeholder="Ask about an image. The answer comes from this machine alone.",
    )


def _head(chat: Chat, title: str) -> str:
    """The model and its base by name, without the folders they are in."""
    facts = [f"{chat.runtime.device}, {chat.runtime.precision}"]
    if chat.base is not None:
        how = "adapter on" if chat.tuned.adapter is not None else "compared with"
        name = Path(chat.base).name if Path(chat.base).is_absolute() else chat.base
        facts.insert(0, f"{how} {html.escape(name)}")
    return f"<h1>{html.escape(title)}</h1><p>{' · '.join(facts)}</p>"


def _offers(examples: Sequence[Example], folder: Path) -> list[list[dict[str, Any]]]:
    """Questions to start from, with copies of their images: no path of the data is ever served."""
    offers = []
    for number, example in enumerate(examples, 1):
        copies = []
        try:
            for place, image in enumerate(example.images, 1):
                copy = folder / f"example-{number}-{place}{Path(image).suffix}"
                copy.write_bytes(read_image(image, store=FolderStore(example.root)))
                copies.append(str(copy))
        except UserError:
            continue  # an example is an offer; the page does without it
        offers.append([{"text": example.prompt, "files": copies}])
    return offers


def _small(image: Image.Image, side: int) -> Image.Image:
    small = image.copy()
    small.thumbnail((side, side))
    return small


def _contact_sheet(frames: Sequence[Image.Image]) -> Image.Image:
    """The frames in reading order, in rows of four."""
    columns = min(SHEET_COLUMNS, len(frames))
    cells = [_small(frame, SHOWN_SIDE // columns) for frame in frames]
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    gap = 4
    rows = math.ceil(len(cells) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, cell in enumerate(cells):
        sheet.paste(cell, (index % columns * (width + gap), index // columns * (height + gap)))
    return sheet
