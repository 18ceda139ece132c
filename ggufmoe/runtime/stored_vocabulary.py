"""The vocabulary of a GGUF file by itself: llama.cpp reads the file's metadata and no weights.

Owns a model that is loaded for its vocabulary alone, and the thread in which llama.cpp may give up. Texts are tokenized
as an engine of the same file tokenizes them.
"""

from __future__ import annotations

import ctypes
import os
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from ggufmoe.errors import ModelLoadError
from ggufmoe.runtime.bindings import native_api, native_log
from ggufmoe.runtime.loading import loading_lock
from ggufmoe.runtime.nativethread import TEXT_STACK_BYTES, NativeThread
from ggufmoe.runtime.vocabulary import LoadedVocabulary


class StoredVocabulary:
    """Tokenizes texts by the vocabulary in a GGUF file; close it, or use it in a ``with`` block.

    Raises EngineMissingError without llama-cpp-python, ModelLoadError for a vocabulary that llama.cpp refuses,
    EngineError for a file without one, and EngineLostError where llama.cpp gives up.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._api = native_api()
        self._model: Any = None
        flag = ctypes.create_string_buffer(1)
        self._thread = NativeThread(str(path), flag, self._free, has_team=False, stack_bytes=TEXT_STACK_BYTES)
        try:
            with loading_lock:  # the log is read meanwhile; llama.cpp may give up in the other thread
                self._vocabulary = self._thread.call(self._load)
            self.bos, self.eos = (self._text(which) for which in ("bos_token", "eos_token"))
        except BaseException:
            self.close()
            raise

    def tokenize(self, text: str) -> list[int]:
        """The ids of ``text``, special tokens in it included; BOS first where the file says so, unless it is there."""
        begins = bool(self.bos) and text.startswith(self.bos)
        tokenize = partial(self._vocabulary.tokenize, text, add_bos=not begins, parse_special=True)
        return self._thread.call(partial(tokenize, stack_bytes=self._thread.stack_bytes))

    def close(self) -> None:
        """Free the vocabulary; a second call does nothing."""
        self._thread.close()

    def _load(self) -> LoadedVocabulary:
        parameters = self._api.llama_model_default_params()
        parameters.vocab_only = True
        mark = native_log().mark()
        self._model = self._api.llama_model_load_from_file(os.fsencode(self._path), parameters)
        if not self._model:
            raise ModelLoadError(
                f"{self._path}: llama.cpp cannot read its vocabulary: {native_log().cause_since(mark)}"
            )
        return LoadedVocabulary(self._api, self._model, self._path)

    def _text(self, which: str) -> str:
        return self._thread.call(lambda: self._vocabulary.token_text(getattr(self._vocabulary, which)))

    def _free(self) -> None:
        if self._model:
            self._api.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> StoredVocabulary:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
