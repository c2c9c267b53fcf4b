"""Queueing formulas. lambda arrivals a second, mu services a second and server, c servers; a = lambda/mu, rho = a/c.

Sources: A. K. Erlang 1917; L. Kleinrock, "Queueing Systems", 1975. Times in seconds.
"""

import math


def erlang_b(servers: int, load: float) -> float:
    """Share of the arrivals that find all servers busy when none waits (M/M/c/c). load is a."""
    blocked = 1.0
    for count in range(1, servers + 1):
        blocked = load * blocked / (count + load * blocked)
    return blocked


def erlang_c(servers: int, load: float) -> float:
    """Share of the arrivals that have to wait (M/M/c). load is a, below servers."""
    blocked = erlang_b(servers, load)
    return blocked / (1 - load / servers * (1 - blocked))


def mmc_wait_s(servers: int, arrivals_per_s: float, services_per_s: float) -> float:
    """Mean wait before service, M/M/c."""
    return erlang_c(servers, arrivals_per_s / services_per_s) / (servers * services_per_s - arrivals_per_s)


def mmc_wait_quantile_s(servers: int, arrivals_per_s: float, services_per_s: float, share: float) -> float:
    """The wait that `share` of the arrivals stay below, M/M/c: P(W > t) = C exp(-(c mu - lambda) t)."""
    waiting = erlang_c(servers, arrivals_per_s / services_per_s)
    return max(0.0, math.log(waiting / (1 - share)) / (servers * services_per_s - arrivals_per_s))


def md1_wait_s(arrivals_per_s: float, service_s: float) -> float:
    """Mean wait, M/D/1."""
    rho = arrivals_per_s * service_s
    return rho * service_s / (2 * (1 - rho))


def mg1_wait_s(arrivals_per_s: float, mean_s: float, second_moment: float) -> float:
    """Mean wait, M/G/1 (Pollaczek, Khinchine). second_moment is E[S^2]."""
    return arrivals_per_s * second_moment / (2 * (1 - arrivals_per_s * mean_s))


def mmck(servers: int, places: int, load: float) -> list[float]:
    """Probabilities of 0 .. places steps in the system, M/M/c/K; places counts those in service."""
    weights = [1.0]
    for count in range(1, places + 1):
        weights.append(weights[-1] * load / min(count, servers))
    total = sum(weights)
    return [weight / total for weight in weights]


def mmck_utilisation(servers: int, places: int, load: float) -> float:
    """Goodput as a share of the capacity of all servers, M/M/c/K."""
    return load / servers * (1 - mmck(servers, places, load)[-1])
