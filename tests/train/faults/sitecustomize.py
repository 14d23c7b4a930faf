"""Python reads this at its start where this folder is on PYTHONPATH: ranks that a real launcher
starts then run a stage of the tests, which brings the fault that FAULT names."""

import os

if "FAULT" in os.environ:
    import train.compose

    def _build(_: object) -> object:
        from faulty import Faulty

        return Faulty(os.environ["FAULT"])

    train.compose.bind = lambda *_: None
    train.compose.build = _build
