import pytest

from gateway.core.lifecycle import END_STATES, TABLE, Event, IllegalEvent, State, advance


def test_every_state_and_event_is_used() -> None:
    assert set(TABLE) == set(State)
    assert {event for events in TABLE.values() for event in events} == set(Event)


def test_every_state_is_reached_and_reaches_an_end() -> None:
    reached, frontier = {State.RECEIVED}, [State.RECEIVED]
    while frontier:
        for following in TABLE[frontier.pop()].values():
            if following not in reached:
                reached.add(following)
                frontier.append(following)
    assert reached == set(State)
    leads_to_end = set(END_STATES)
    while more := {state for state in State if state not in leads_to_end and leads_to_end & set(TABLE[state].values())}:
        leads_to_end |= more
    assert leads_to_end == set(State)


@pytest.mark.parametrize("state", sorted(State))
@pytest.mark.parametrize("event", sorted(Event))
def test_an_event_leads_to_its_state_or_raises(state: State, event: Event) -> None:
    if event in TABLE[state]:
        assert advance(state, event) is TABLE[state][event]
    else:
        with pytest.raises(IllegalEvent, match=f"{state} cannot {event}"):
            advance(state, event)
