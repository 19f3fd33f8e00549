"""`phi3v export --serve-check`: whether vLLM, started on a folder and asked over HTTP, answers as our model does."""

from __future__ import annotations

import base64
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console

from phi3v.errors import UserError
from phi3v.export.proof import NEW_TOKENS, drawn_probe, load_export
from phi3v.model.configuration import CLIP_VIT_L_14_336, IMAGE_TOKEN_ID, Phi3VConfig
from phi3v.processing.conversation import stop_token_ids
from phi3v.terminal import say

VLLM_VARIABLE = "PHI3V_VLLM"
START_SECONDS = 900.0  # loading 8 GB from a slow disk, and compiling
# Two implementations in float32 differ by the order of sums only, 2e-6 where it was measured; a wrong token, position
# or crop is worth 1e-2 and more.
TOLERANCE = 1e-4


class ServedDiffersError(RuntimeError):
    """vLLM answers from a folder otherwise than our own model; the folder stays as it is."""


Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Attributes:
        prompt: the ids that the model read.
        tokens: the ids that it wrote.
        logprobs: of each of these.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Served:
    """How vLLM's answers compare with ours.

    Attributes:
        version: of vLLM.
        questions, equal: how many were asked, and how many had the same prompt and answer, token by token.
        worst: the largest difference of two tokens' log-probabilities.
    """

    version: str
    questions: int
    equal: int
    worst: float

    @property
    def same(self) -> bool:
        """Whether it is the same model."""
        return self.equal == self.questions and self.worst <= TOLERANCE

    def to_json_dict(self) -> dict[str, Any]:
        return asdict(self) | {"tolerance": TOLERANCE}

    def __str__(self) -> str:
        return (
            f"vLLM {self.version}: {self.equal} of {self.questions} answers equal, token by token, "
            f"log-probabilities within {self.worst:.1e}"
        )


def find_vllm(given: str | None) -> Path:
    """The executable: ``given``, else ``$PHI3V_VLLM``, else beside this Python, else on the path.

    Raises:
        UserError: there is none, or phi3v is not installed beside it.
    """
    given = given or os.environ.get(VLLM_VARIABLE)
    beside = Path(sys.executable).parent
    found = shutil.which(given or "vllm", path=None if given else f"{beside}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise UserError(
            "there is no vllm" if given is None else "no executable of this name",
            where="--serve-check" if given is None else f"--vllm {given}",
            hint=f"name the vllm of the environment that serves, with --vllm or in ${VLLM_VARIABLE}",
        )
    python = Path(found).with_name("python")
    if python.is_file():
        plugins = "from importlib.metadata import entry_points as e; print(e(group='vllm.general_plugins').names)"
        done = subprocess.run([str(python), "-c", plugins], capture_output=True, text=True, check=False)
        if done.returncode == 0 and "'phi3v'" not in done.stdout:
            raise UserError(
                "phi3v is not installed beside it, and vLLM needs its configuration and processor",
                where=found,
                hint=f"{python} -m pip install phi3v",
            )
    return Path(found)


def require_servable(config: Phi3VConfig) -> None:
    """vLLM has the vision tower and the id of an image's tokens as constants; its answers are compared in float32.

    Raises:
        UserError: the model has others, or is quantised.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            "is for float models: what vLLM computes with quantised weights is rounded on the way",
            where="--serve-check",
            hint="check the official layout (--format hf); `phi3v export --verify` proves the quantised folder",
        )
    tower = CLIP_VIT_L_14_336 | (config.clip_vision_config or {})
    if tower != CLIP_VIT_L_14_336 or config.image_token_id != IMAGE_TOKEN_ID:
        raise UserError(
            "vLLM serves this model with the vision tower and the vocabulary of the released ones only",
            where="--serve-check",
            hint="leave it out for a model of another size",
        )


def serve_check(folder: Path, vllm: Path, console: Console) -> Served:
    """Ask our own model and vLLM the same questions.

    Raises:
        UserError: vLLM cannot serve the model, or does not start.
        ServedDiffersError: it answers otherwise.
    """
    config = Phi3VConfig.from_pretrained(folder)
    require_servable(config)
    with tempfile.TemporaryDirectory() as work:
        conversations = drawn_conversations(Path(work))
        ours = own_answers(folder, conversations)
        asked = [(messages, own) for messages, own in zip(conversations, ours, strict=True) if own is not None]
        say(console, f"asking {vllm} {len(asked)} questions")
        with running_server(vllm, folder, Path(work) / "vllm.log", config.long_context_start) as url:
            theirs = [ask(url, messages) for messages, _ in asked]
            version = httpx.get(f"{url}/version").json()["version"]
    pairs = [(own, other) for (_, own), other in zip(asked, theirs, strict=True)]
    served = Served(
        version=version,
        questions=len(pairs),
        equal=sum(own.prompt == other.prompt and own.tokens == other.tokens for own, other in pairs),
        worst=max(abs(a - b) for own, other in pairs for a, b in zip(own.logprobs, other.logprobs, strict=False)),
    )
    if not served.same:
        raise ServedDiffersError(f"vLLM does not answer as phi3v does: {served}; {TOLERANCE:.0e} would be rounding")
    say(console, str(served))
    return served


def drawn_conversations(folder: Path) -> list[Messages]:
    """Chats about none, one and two images, wide and tall, and one of two turns; images are paths in ``folder``."""
    wide, tall = ({"type": "image", "path": drawn_probe(folder, index).images[0]} for index in (3, 2))
    what, compare, color = (
        {"type": "text", "text": text}
        for text in ("What is shown?", "How do the two images differ?", "Which color has the circle?")
    )
    return [
        [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Which color has the sky?"}],
        [{"role": "user", "content": [wide, what]}],
        [{"role": "user", "content": [tall, what]}],
        [{"role": "user", "content": [wide, tall, compare]}],
        [
            {"role": "user", "content": [what, wide]},
            {"role": "assistant", "content": "A page with a number."},
            {"role": "user", "content": [tall, color]},
        ],
    ]


@torch.inference_mode()
def own_answers(folder: Path, conversations: Sequence[Messages]) -> list[Answer | None]:
    """Our own model's, in float32; `None` for a conversation that is longer than LongRoPE's short factors are for."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = load_export(folder, device)
    answers: list[Answer | None] = []
    for messages in conversations:
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(device)
        prompt = inputs["input_ids"][0].tolist()
        if len(prompt) + NEW_TOKENS > model.config.long_context_start:
            answers.append(None)
            continue
        made = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=stop_token_ids(processor.backend_tokenizer),
            pad_token_id=processor.tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = made.sequences[0, len(prompt) :]
        rows = torch.cat(made.logits).float().log_softmax(-1)  # [tokens, V]
        answers.append(Answer(prompt, tokens.tolist(), rows.gather(1, tokens[:, None])[:, 0].tolist()))
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the server
    return answers


@contextmanager
def running_server(vllm: Path, folder: Path, log: Path, max_model_len: int) -> Iterator[str]:
    """``vllm serve folder`` on a free port, ended with all its processes on leaving.

    Args:
        log: where its output goes.

    Yields:
        Its address.

    Raises:
        UserError: it is not ready in time; with the end of its output.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(vllm), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", str(max_model_len), "--limit-mm-per-prompt", '{"image": 2}', "--enforce-eager"]
    environment = {key: value for key, value in os.environ.items() if key != "VLLM_API_KEY"}
    environment["VLLM_NO_USAGE_STATS"] = "1"  # which it sends to its makers
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            _wait_until_ready(server, url, log)
            yield url
        finally:
            _end(server)


def _wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < end:
        try:
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    what = f"is not ready after {START_SECONDS:.0f} s" if server.poll() is None else f"ended with {server.returncode}"
    last = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
    raise UserError(f"the server {what}:\n{last}", where=" ".join(map(str, server.args)))  # type: ignore[arg-type]


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server and what it started, which is a process group of its own."""
    for number, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
        try:
            os.killpg(server.pid, number)
            server.wait(seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def ask(url: str, messages: Messages) -> Answer:
    """vLLM's answer, by its chat completions as any client would ask, with images as data URLs."""
    request = {
        "messages": [message | {"content": _content(message["content"])} for message in messages],
        "max_completion_tokens": NEW_TOKENS,
        "temperature": 0,
        "logprobs": True,
        "return_token_ids": True,
    }
    response = httpx.post(f"{url}/v1/chat/completions", json=request, timeout=600)
    if response.is_error:
        raise RuntimeError(f"vLLM refuses a question: {response.text[:2000]}")
    found = response.json()
    choice = found["choices"][0]
    logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
    return Answer(found["prompt_token_ids"], choice["token_ids"], logprobs)


def _content(content: str | list[dict[str, str]]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [
        {"type": "image_url", "image_url": {"url": data_url(Path(block["path"]))}} if "path" in block else block
        for block in content
    ]


def data_url(png: Path) -> str:
    """A PNG file as a ``data:`` URL."""
    return "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode()
