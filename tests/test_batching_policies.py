"""The built-in batching policies: whom they serve, when they wait, what they learn."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policy import BatchView, ModelView
from gateway.types import BatchCost
from plugins.fixed_window import FixedWindow, FixedWindowConfig
from plugins.marginal import Marginal, MarginalConfig
from plugins.passthrough import Passthrough, PassthroughConfig

MODELS = {
    "has a batcher": ModelView("a", 8, server_batches=True, instances=1),
    "takes no batches": ModelView("b", 0, server_batches=False, instances=1),
    "one row": ModelView("c", 1, server_batches=False, instances=1),
    "needs a batcher": ModelView("d", 8, server_batches=False, instances=2),
}


def view(size: int, *, arrivals_per_s: float = 100.0, idle: int = 1, oldest_wait_s: float = 0.0, slack_s: float = 60.0) -> BatchView:
    return BatchView(size, 16, oldest_wait_s, slack_s, idle, arrivals_per_s)


def learnt(fixed_s: float = 0.02, each_s: float = 0.002, *, instances: int = 1, **parameters: float) -> Marginal:
    policy = Marginal(MarginalConfig(**parameters))  # type: ignore[arg-type]
    assert policy.serves(ModelView("m", 16, server_batches=False, instances=instances))
    for size in (1, 4, 2, 8, 3):
        policy.on_batch(size, fixed_s + each_s * size, 0.0)
    return policy


def test_between_them_the_defaults_serve_every_model_and_names_are_exclusive() -> None:
    served = {
        name: (
            Passthrough(PassthroughConfig()).serves(model),
            Marginal(MarginalConfig()).serves(model),
            FixedWindow(FixedWindowConfig()).serves(model),
        )
        for name, model in MODELS.items()
    }
    ours, servers = (False, True, True), (True, False, False)
    assert served == {"has a batcher": servers, "takes no batches": servers, "one row": servers, "needs a batcher": ours}
    for named in (
        Passthrough(PassthroughConfig(models=("a", "d"))),
        Marginal(MarginalConfig(models=("a", "d"))),
        FixedWindow(FixedWindowConfig(models=("a", "d"))),
    ):
        assert [named.serves(model) for model in MODELS.values()] == [True, False, False, True]


def test_passthrough_never_waits() -> None:
    policy = Passthrough(PassthroughConfig())
    policy.on_batch(3, 0.1, 0.0)
    assert policy.wait_s(view(1), 0.0) == 0.0
    assert policy.learnt() is None


def test_fixed_window_waits_for_size_or_delay() -> None:
    policy = FixedWindow(FixedWindowConfig(size=4, delay_s=0.01))
    assert policy.wait_s(view(1, oldest_wait_s=0.004), 0.0) == pytest.approx(0.006)
    assert policy.wait_s(view(1, oldest_wait_s=0.02), 0.0) == 0.0
    assert policy.wait_s(view(4), 0.0) == 0.0
    policy.reconfigure(FixedWindowConfig(delay_s=0.5))
    assert policy.wait_s(view(15), 0.0) == 0.5
    assert policy.wait_s(view(16), 0.0) == 0.0


def test_marginal_learns_the_line_and_the_rule_follows() -> None:
    policy = learnt()
    cost = policy.learnt()
    assert cost is not None
    assert [cost.fixed_s, cost.each_s, cost.batches] == pytest.approx([0.02, 0.002, 5])
    # (lambda*t0 - 1) / (1 + lambda*a): 0 at 50 a second, .83 at 100, 2.14 at 200
    assert [policy.wait_s(view(1, arrivals_per_s=rate), 0.0) > 0 for rate in (0.0, 40.0, 100.0, 120.0, 200.0)] == [
        False,
        False,
        False,
        True,
        True,
    ]
    assert [policy.wait_s(view(size, arrivals_per_s=200.0), 0.0) > 0 for size in (1, 2, 3)] == [True, True, False]


def test_marginal_does_not_wait_before_it_knows_or_while_two_are_idle() -> None:
    policy = Marginal(MarginalConfig())
    assert policy.wait_s(view(1, arrivals_per_s=1000.0), 0.0) == 0.0
    for _ in range(100):
        policy.on_batch(1, 0.022, 0.0)
    assert policy.wait_s(view(1, arrivals_per_s=1000.0), 0.0) == 0.0  # a slope cannot be told from one size
    assert policy.learnt() is None
    assert learnt(instances=2).wait_s(view(1, arrivals_per_s=1000.0, idle=2), 0.0) == 0.0
    # the last idle one of two: (lambda * .75 * t0 - 1) / (1 + lambda*a)
    assert [learnt(instances=2).wait_s(view(1, arrivals_per_s=rate), 0.0) > 0 for rate in (120.0, 160.0)] == [False, True]


def test_marginal_waits_no_longer_than_it_can_gain_than_the_cap_and_than_the_slack_allows() -> None:
    many = 400.0
    assert learnt().wait_s(view(1, arrivals_per_s=many), 0.0) == pytest.approx(0.02)
    assert learnt().wait_s(view(1, arrivals_per_s=many, oldest_wait_s=0.015), 0.0) == pytest.approx(0.005)
    assert learnt().wait_s(view(1, arrivals_per_s=many, oldest_wait_s=0.03), 0.0) == 0.0
    assert learnt(max_wait_s=0.002).wait_s(view(1, arrivals_per_s=many), 0.0) == pytest.approx(0.002)
    assert learnt().wait_s(view(1, arrivals_per_s=many, slack_s=0.034), 0.0) == pytest.approx(0.005)  # half of what 24 ms leave
    assert learnt().wait_s(view(1, arrivals_per_s=many, slack_s=0.02), 0.0) == 0.0


def test_marginal_keeps_its_slope_while_only_one_size_comes_and_follows_a_change() -> None:
    policy = learnt()
    for _ in range(2000):
        policy.on_batch(4, 0.028, 0.0)
    cost = policy.learnt()
    assert cost is not None
    assert [cost.fixed_s, cost.each_s] == pytest.approx([0.02, 0.002])
    for _ in range(2000):
        policy.on_batch(4, 0.068, 0.0)  # without other sizes nobody can say which of the two has changed
    cost = policy.learnt()
    assert cost is not None
    assert cost.fixed_s + 4 * cost.each_s == pytest.approx(0.068, rel=0.01)
    for number in range(2000):
        policy.on_batch(1 + number % 8, 0.01 + 0.001 * (1 + number % 8), 0.0)
    cost = policy.learnt()
    assert cost is not None
    assert [cost.fixed_s, cost.each_s] == pytest.approx([0.01, 0.001], rel=0.05)


def test_a_stall_moves_what_was_learnt_little() -> None:
    policy = learnt()
    for number in range(50):
        policy.on_batch(1 + number % 8, 0.02 + 0.002 * (1 + number % 8), 0.0)
    policy.on_batch(5, 60.0, 0.0)
    cost = policy.learnt()
    assert cost is not None
    assert cost.fixed_s + 5 * cost.each_s == pytest.approx(0.03, rel=0.2)


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(0.0, 100.0)), max_size=60), st.floats(0, 1e6), st.integers(1, 64))
def test_whatever_it_sees_costs_and_waits_are_times(samples: list[tuple[int, float]], rate: float, size: int) -> None:
    policy = Marginal(MarginalConfig())
    for rows, service_s in samples:
        policy.on_batch(rows, service_s, 0.0)
        cost = policy.learnt()
        assert cost is None or (isinstance(cost, BatchCost) and 0 <= cost.fixed_s < 1000 and 0 <= cost.each_s < 1000)
        assert 0 <= policy.wait_s(view(size, arrivals_per_s=rate), 0.0) <= 1.0


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (MarginalConfig, {"max_wait_s": 0.0}),
        (MarginalConfig, {"slack_share": 1.5}),
        (MarginalConfig, {"memory_batches": 1.0}),
        (FixedWindowConfig, {"size": -1}),
        (FixedWindowConfig, {"delay_s": -0.1}),
    ],
)
def test_parameters_out_of_range_are_refused(config: type[object], parameters: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(parameters))):
        config(**parameters)
