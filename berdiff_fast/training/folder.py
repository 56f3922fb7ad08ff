# SPDX-License-Identifier: Apache-2.0
"""The folder of a run, which one run at a time works in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import broadcast_object_list

from berdiff_fast import locks
from berdiff_fast.files import refuse_link

if TYPE_CHECKING:
    from accelerate import Accelerator

#: Folders inside, which others fill by their names.
_FOLDERS = ("checkpoints", "previews", "tensorboard", "wandb", "dvclive", "swanlab", ".aim")


@contextmanager
def run_folder(output: Path, accelerator: Accelerator) -> Iterator[None]:
    """The folder of a run, made and locked by the main process, as long as the block runs.

    Raises:
        BusyError: another run is at work there; in every process.
        FileExistsError: a symbolic link stands where the run would write.
        OSError: it cannot be made.
    """
    with ExitStack() as stack:
        error: Exception | None = None
        if accelerator.is_main_process:
            try:
                stack.enter_context(locks.made(output))
                for name in _FOLDERS:
                    refuse_link(output / name)
            except (locks.BusyError, OSError) as refused:
                error = refused
        # The others do not wait for one that is not coming.
        said = broadcast_object_list([None if error is None else str(error)])[0]
        if error is not None:
            raise error
        if said:
            raise locks.BusyError(said)
        yield
