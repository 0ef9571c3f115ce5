"""Programs bound to a request: made as late as they can be, and given what the runtime gives them."""

import torch
from models import optimize, shared

from vitcop_compile import ViTCoPConfig
from vitcop_compile.bench import Request
from vitcop_compile.bench.bind import Served, bind, with_programs


@torch.no_grad()
def test_a_program_is_made_when_a_call_first_needs_it_and_given_what_the_runtime_gives():
    served, request = optimize(shared(4, 2), ViTCoPConfig.preset("1/3")), Request(2, 7, 5)
    calls, given = bind(served, request), {}

    def noting(name, make):
        program = make()
        return lambda *inputs: (given.setdefault(name, [x.clone() for x in inputs]), program(*inputs))[1]

    for name, kinds in (("vision", ["vision"]), ("decode", ["vision", "prefill", "extend"])):
        calls[name]()
        assert [key[0] for key in served.compiled] == kinds
    Served(served, request).decode(with_programs(served, noting))
    for _ in range(2):
        for name, inputs_ in given.items():
            kind = "extend" if name == "decode" else name
            key = next(key[1:] for key in served.compiled if key[0] == kind)
            if kind == "prefill":  # of which a key holds what its schedule says
                assert key[2] == served.schedule.key
                key = (*key[:2], served.schedule, *key[3:])
            expected = getattr(served.on_demand, kind)(*key)(*inputs_)
            assert all(torch.equal(a, b) for a, b in zip(calls[name](), expected, strict=True))
