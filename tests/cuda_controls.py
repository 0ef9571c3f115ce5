"""Small programs whose generated code is wrong on purpose: `python cuda_controls.py out.json`, in a process of its own, writes
their facts by name, or the error that ended their compilation."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from vitcop_compile.backends import _cuda_options
from vitcop_compile.regress.cuda import generated
from vitcop_compile.regress.cuda.fake import fake_cuda


class Step(nn.Module):
    """Writes a row into a cache, and looks at all of it."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        if how == "on the host":
            self.register_buffer("table", torch.zeros(64, device="cpu"))

    def forward(self, row: Tensor, at: Tensor, cache: Tensor) -> Tensor:
        if self.how == "copied":
            new = cache.index_put((at,), row)
            out = (new @ row.T).sum() + (cache @ row.T).sum()
            cache.copy_(new)
            return out
        cache.index_put_((at,), row)
        if self.how == "on the host":
            row = row + self.table.sin().to(row.device)
        return cache @ row.T


def main() -> None:
    generated.install("sm_90", build=False)
    found = {}
    with fake_cuda(), torch.no_grad():
        for how in ("right", "moving", "copied", "on the host"):
            given = (torch.zeros(1, 64), torch.zeros(1, dtype=torch.int64), torch.zeros(300, 64))
            for tensor in given if how != "moving" else ():
                torch._dynamo.mark_static_address(tensor, guard=False)
            compiled = torch.compile(Step(how), fullgraph=True, dynamic=False, options=_cuda_options(decode=True))
            try:
                found[how] = generated.facts_of(generated.generate_from(compiled, given))
            except Exception as error:
                found[how] = {"error": str(error)}
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
