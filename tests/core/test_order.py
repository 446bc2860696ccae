"""The eviction order: lazy as it is, its first is always the true minimum, and finding it isn't a scan."""

from hypothesis import given
from hypothesis import strategies as st

from saltern.core.order import EvictionOrder, Stamp


class Item:
    """Something with a stamp, which counts how often it is looked at."""

    looks = 0

    def __init__(self, time: float, serial: int) -> None:
        self.time = time
        self.serial = serial
        self.may_go = True

    @property
    def stamp(self) -> Stamp | None:
        Item.looks += 1
        return (self.time, 0, self.serial) if self.may_go else None


Action = tuple[str, int, int]
"""What is done, to which item, and by how much."""

actions = st.lists(
    st.tuples(
        st.sampled_from(["add", "touch", "pin", "unpin", "withdraw", "first"]), st.integers(0, 7), st.integers(0, 5)
    ),
    max_size=120,
)


@given(actions)
def test_first_is_the_least_of_those_that_may_go(script: list[Action]) -> None:
    order: EvictionOrder[Item] = EvictionOrder()
    items: dict[int, Item] = {}
    for serial, (verb, name, amount) in enumerate(script):
        item = items.get(name)
        match verb:
            case "add" if item is None:
                items[name] = Item(amount, serial)
                order.offer(items[name])
            case "touch" if item is not None:
                item.time += amount
            case "pin" if item is not None:
                item.may_go = False
            case "unpin" if item is not None:
                item.may_go = True
                order.offer(item)
            case "withdraw" if item is not None:
                order.withdraw(items.pop(name))
            case "first":
                assert order.first() is least(items)
            case _:
                pass
    while (first := order.first()) is not None:
        assert first is least(items)
        name = next(name for name, item in items.items() if item is first)
        order.withdraw(items.pop(name))
    assert least(items) is None


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 9)), max_size=60))
def test_an_item_that_may_go_earlier_than_before_is_offered_again(moves: list[tuple[int, float]]) -> None:
    """As a user does whose oldest block is unpinned."""
    order: EvictionOrder[Item] = EvictionOrder()
    items = {serial: Item(5.0, serial) for serial in range(4)}
    for item in items.values():
        order.offer(item)
    for name, time in moves:
        items[name].time = time
        order.offer(items[name])
        assert order.first() is least(items)


def test_touching_leaves_nothing_behind() -> None:
    order: EvictionOrder[Item] = EvictionOrder()
    items = [Item(0.0, serial) for serial in range(100)]
    for time in range(200):
        for item in items:
            item.time = time
            order.offer(item)
    assert len(order._heap) <= len(items)


def test_withdrawn_items_are_let_go() -> None:
    order: EvictionOrder[Item] = EvictionOrder()
    for serial in range(10_000):
        item = Item(float(serial), serial)
        order.offer(item)
        order.withdraw(item)
    assert order.first() is None
    assert len(order._heap) <= 128


def test_an_item_that_goes_back_and_forth_is_kept_a_bounded_number_of_times() -> None:
    """As a user does whose oldest block is pinned and unpinned, while another user's is asked for."""
    order: EvictionOrder[Item] = EvictionOrder()
    first, moving = Item(0.0, 0), Item(1.0, 1)
    for item in (first, moving):
        order.offer(item)
    for _ in range(10_000):
        moving.time = 10.0
        order.offer(moving)
        order.first()
        moving.time = 1.0
        order.offer(moving)
        order.first()
    assert len(order._heap) <= 128


def test_finding_the_first_of_many_is_not_a_scan() -> None:
    order: EvictionOrder[Item] = EvictionOrder()
    items = [Item(float(serial), serial) for serial in range(100_000)]
    for item in items:
        order.offer(item)
    Item.looks = 0
    for item in items[:1_000]:
        assert order.first() is item
        order.withdraw(item)
    assert Item.looks <= 2_000


def least(items: dict[int, Item]) -> Item | None:
    """Return what `first()` must be, by a scan."""
    stamps = [(item.time, item.serial, name) for name, item in items.items() if item.may_go]
    return items[min(stamps)[2]] if stamps else None
