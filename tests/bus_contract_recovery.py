"""What every bus must do for who takes a step over from another process, and about the way to other regions."""

import pytest
from bus_rig import MakeRig, done, eventually, eventually_true, finish, make_result, make_step, pull

from gateway import subjects
from gateway.errors import Unavailable
from gateway.run_types import RoundTrip, RoundTrips
from gateway.types import Kind

MARK = "feedbeef"


class RecoveryContract:
    """Marks that are heard, steps that are resumed and located, round trips."""

    async def test_a_heard_mark_is_answered_by_the_commit(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway, worker = await rig.gateway(), await rig.worker()
        inbox = await pull(rig, worker, 2)
        heard = await gateway.hear(MARK)
        again = await gateway.hear(MARK)
        step = make_step(rig, id=f"{MARK}-{rig.tenant}")
        future = gateway.execute(step, rig.region)
        delivery = await inbox.next()
        assert delivery.answered_by_commit
        await heard.close()  # the other one still hears it
        assert await finish(worker, delivery, make_result(step))
        assert await done(future) == make_result(step)
        await again.close()
        await again.close()
        later = make_step(rig, id=f"{MARK}-{rig.tenant}-2")
        future = gateway.execute(later, rig.region)
        delivery = await inbox.next()
        assert not delivery.answered_by_commit  # the worker has to tell it
        assert await finish(worker, delivery, make_result(later))
        assert await done(future) == make_result(later)

    async def test_another_gateway_takes_a_step_over(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        first, second, worker = await rig.gateway(), await rig.gateway("g2"), await rig.worker()
        await first.hear(MARK)
        step = make_step(rig, id=f"{MARK}-{rig.tenant}")
        first.execute(step, rig.region).cancel()
        await eventually_true(lambda: first.is_queued(step, rig.region))
        await second.hear(MARK)
        assert await second.locate(step, [rig.other_region, rig.region]) == (None, rig.region)
        future = second.resume(step, rig.region)
        delivery = await (await pull(rig, worker, 1)).next()
        assert await finish(worker, delivery, make_result(step))
        assert await done(future) == make_result(step)
        assert (await second.locate(step, [rig.other_region, rig.region]))[0] == make_result(step)

    async def test_a_step_that_ended_before_is_resumed_with_its_result(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway, worker = await rig.gateway(), await rig.worker()
        step = make_step(rig)
        assert await worker.commit(make_result(step), 60.0, rig.region)
        assert await done(gateway.resume(step, rig.region)) == make_result(step)

    async def test_a_step_that_was_never_sent_is_nowhere(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway = await rig.gateway()
        assert await gateway.locate(make_step(rig), [rig.region, rig.other_region]) == (None, "")

    async def test_results_are_where_their_region_is(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway, worker = await rig.gateway(), await rig.worker()
        run = make_step(rig, id=subjects.job_id(rig.other_region, rig.tenant, Kind.RUN, "program", "key"))
        assert subjects.result_region(run.id, rig.region) == rig.other_region
        assert await worker.commit(make_result(run), 60.0, rig.other_region)
        assert await gateway.result(run.tenant, run.id) == make_result(run)
        assert await worker.result(run.tenant, run.id, rig.region) is None
        assert not await gateway.commit(make_result(run, worker="late"), 60.0)
        step = make_step(rig)
        assert await worker.commit(make_result(step), 60.0, rig.other_region)
        found, queued_in = await gateway.locate(step, [rig.region, rig.other_region])
        assert (found, queued_in) == (make_result(step), "")

    async def test_round_trips_reach_gateways(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway, worker = await rig.gateway(), await rig.worker()
        scope = f"tool.{rig.target.name}"
        await worker.publish_round_trip(RoundTrip(rig.region, rig.other_region, 0.25, 3))
        await worker.publish_round_trip(RoundTrip(rig.region, scope, 0.5))
        await worker.publish_round_trip(RoundTrip(rig.region, rig.other_region, 0.125, 4))

        def known(trips: RoundTrips) -> tuple[float | None, float | None, float | None]:
            return trips.between(rig.other_region, rig.region), trips.to_target(rig.region, scope), trips.to_target(rig.other_region, scope)

        await eventually(lambda: known(gateway.round_trips()) == (0.125, 0.5, None))
        assert known((await rig.gateway("late")).round_trips()) == (0.125, 0.5, None)

    async def test_a_worker_of_the_region_answers_a_ping(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        worker, other = await rig.worker(), await rig.worker("w2")
        with pytest.raises(Unavailable):
            await other.ping(rig.region)
        answering = await worker.serve_ping()
        assert await other.ping(rig.region) >= 0.0
        with pytest.raises(Unavailable):
            await other.ping(rig.other_region)
        await answering.close()
        with pytest.raises(Unavailable):
            await other.ping(rig.region)
