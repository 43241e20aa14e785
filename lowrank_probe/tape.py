"""A training step on sizes alone: what autograd saves, makes and frees, as torch does it, without torch.

An `Array` stands for a tensor. An operator says what it saves for its backward pass; a `Buffer` is live while an array,
a list of saved ones or a gradient holds it (Python's reference count, as in torch). `Tape.backward` walks the operators
in torch's order, newest first, and frees what each one saved. For every part of the step the largest sum of live bytes
is kept, with what it was made of.

Legend: T tokens; a symbol names a width, as h in T·h entries.
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from lowrank_probe.training_steps import COMPONENTS

# Where the head and the loss are, forward and backward: their peaks grow differently with the number of blocks.
HEAD: Final = "head"
HEAD_BACK: Final = "head, backward"


class Buffer:
    """Bytes that are live while somebody holds this object. shared: two hold it as their gradient."""

    __slots__ = ("n_bytes", "shared", "tape", "text", "what")

    def __init__(self, tape: "Tape", n_bytes: int, what: str, text: str = "") -> None:
        self.tape, self.n_bytes, self.what, self.text, self.shared = tape, n_bytes, what, text, False
        tape.parts[what] += n_bytes
        tape.total += n_bytes
        tape.compare()

    def __del__(self) -> None:
        self.tape.parts[self.what] -= self.n_bytes
        self.tape.total -= self.n_bytes


Back = Callable[[Buffer], list[Buffer | None]]


class Node:
    """An operator's backward pass: the operators that its gradients go to, what it saved, and where it belongs.

    seq: its number; torch runs the newest first. back: gradient of the output → those of the parents.
    """

    __slots__ = ("back", "parents", "place", "saved", "seq")

    def __init__(self, tape: "Tape", parents: Iterable["Node | None"], saved: Iterable[Buffer] = ()) -> None:
        self.seq, self.place = next(tape.counter), tape.place
        self.parents, self.saved = list(parents), list(saved)
        self.back: Back = lambda _: []


@dataclass
class Array:
    """A tensor of tokens × width of `symbol` entries of `item` bytes; node: has its gradient, None where none is."""

    buffer: Buffer
    symbol: str
    item: int
    node: Node | None = None


@dataclass
class Moment:
    """The largest sum of live bytes at one (phase, place), and what it was made of."""

    total: int = 0
    parts: Counter[str] = field(default_factory=Counter)


class Tape:
    """The operators of a step and the bytes that are live.

    tokens, widths: an array has tokens · widths[symbol] entries. place: the part of the model that is run; phase: as in
    `training_steps.PHASES`. moments: (phase, place) → `Moment`. records: whether a graph is made.
    """

    def __init__(self, tokens: int, widths: Mapping[str, int]) -> None:
        self.tokens, self.widths = tokens, widths
        self.phase, self.place, self.records = "forward", "start", True
        self.total = 0
        self.parts: Counter[str] = Counter()
        self.moments: dict[tuple[str, str], Moment] = {}
        self.counter = itertools.count()
        self.gradients: dict[str, Buffer] = {}

    def compare(self) -> None:
        """Keep what is live now, if it is the most so far at this phase and place."""
        moment = self.moments.setdefault((self.phase, self.place), Moment())
        if self.total > moment.total:
            moment.total, moment.parts = self.total, self.parts.copy()

    @contextmanager
    def at(self, place: str, tokens: int | None = None) -> Iterator[None]:
        """Within it, what is made belongs to this place, and has so many tokens."""
        before, self.place, self.tokens = (self.place, self.tokens), place, tokens or self.tokens
        yield
        self.place, self.tokens = before

    def size(self, symbol: str, item: int) -> int:
        """tokens · width · item, in bytes."""
        return self.tokens * self.widths[symbol] * item

    def hold(self, n_bytes: int, what: str = "", text: str = "") -> Buffer:
        """A buffer; `what` it is follows from the phase, where it is not given."""
        return Buffer(self, n_bytes, what or COMPONENTS[self.phase], text)

    def array(self, symbol: str, item: int) -> Array:
        """A new array without a history."""
        return Array(self.hold(self.size(symbol, item), text=f"{item}{symbol}"), symbol, item)

    def leaf(self, x: Array, weights: Mapping[str, int] | None = None) -> Array:
        """The same array as one whose gradient is wanted, or goes into these weights' gradients (name → bytes)."""
        node = Node(self, [])

        def back(_: Buffer) -> list[Buffer | None]:
            for name, n_bytes in (weights or {}).items():
                self.train(name, n_bytes)
            return []

        node.back = back
        return Array(x.buffer, x.symbol, x.item, node)

    def train(self, name: str, n_bytes: int) -> None:
        """A gradient of a weight, which stays; a second one is made beside the first and added to it."""
        made = self.hold(n_bytes, "gradients")
        self.gradients.setdefault(name, made)

    def split(self, x: Array, symbols: Iterable[str]) -> list[Array]:
        """Views of x; their gradients are kept until all are there, and then put together in a new one."""
        if not (self.records and x.node):
            return [Array(x.buffer, symbol, x.item) for symbol in symbols]
        whole, size = Node(self, [x.node]), self.size(x.symbol, x.item)

        def joined(_: Buffer) -> list[Buffer | None]:
            return [self.hold(size)]

        def kept(grad: Buffer) -> list[Buffer | None]:
            whole.saved.append(grad)
            return [self.hold(0)]

        whole.back = joined
        views = []
        for symbol in symbols:
            views.append(Array(x.buffer, symbol, x.item, Node(self, [whole])))
            views[-1].node.back = kept  # type: ignore[union-attr]
        return views

    def op(
        self, inputs: Iterable[Array], symbol: str, item: int, saves: Iterable[Array | Buffer] = (), *,
        weight: int = 0, name: str = "", narrow: int = 0, scratch: int = 0, back_scratch: int = 0,
        saves_out: bool = False,
    ) -> Array:  # fmt: skip
        """A new array from `inputs`, each of which gets a new gradient of its own size.

        saves: what backward needs. weight: bytes of the gradient of the weight that it trains; name: the weight's, of
        those that are used several times; narrow: bytes of the copy that is used in its place, whose gradient is made
        first. scratch, back_scratch: bytes that only the operator itself, or its backward pass, has beside that.
        """
        inputs = list(inputs)
        if scratch:
            self.hold(scratch)
        out = self.array(symbol, item)
        if not self.records or not (weight or any(x.node for x in inputs)):
            return out
        saved = [x.buffer if isinstance(x, Array) else x for x in saves] + [out.buffer] * saves_out
        parents = [x.node for x in inputs]
        sizes = [self.size(x.symbol, x.item) if x.node else 0 for x in inputs]
        if narrow:
            parents.append(self.leaf(out, {name or f"{next(self.counter)}": weight}).node)
            sizes.append(narrow)
            weight = 0
        out.node = Node(self, parents, saved)

        def back(_: Buffer) -> list[Buffer | None]:
            made = [self.hold(n) if n else None for n in sizes]
            if weight:
                self.train(name or str(len(self.gradients)), weight)
            if back_scratch:
                self.hold(back_scratch)
            return made

        out.node.back = back
        return out

    def cast(self, x: Array, item: int) -> Array:
        """The same in `item` bytes an entry: itself where it has them."""
        return x if x.item == item else self.op([x], x.symbol, item)

    def multiply(self, x: Array, y: Array) -> Array:
        """x ∘ y; saves the side that the other's gradient needs."""
        saves = [a for a, other in ((x, y), (y, x)) if other.node]
        return self.op([x, y], x.symbol, max(x.item, y.item), saves)

    def add(self, x: Array, y: Array) -> Array:
        """x + y: saves nothing, and hands its gradient on to both, in a new buffer only where a side is narrower."""
        item = max(x.item, y.item)
        out = self.array(x.symbol, item)
        if self.records and (x.node or y.node):
            out.node = Node(self, [x.node, y.node])
            sizes = [(self.size(z.symbol, z.item), z.item == item, z.node is not None) for z in (x, y)]

            def back(grad: Buffer) -> list[Buffer | None]:
                grad.shared |= all(same and wanted for _, same, wanted in sizes)
                return [(grad if same else self.hold(n)) if wanted else None for n, same, wanted in sizes]

            out.node.back = back
        return out

    def checkpoint(self, run: Callable[[Array], Array], x: Array) -> Array:
        """run(x), of which x alone is saved: its backward pass runs it again."""
        records, self.records = self.records, False
        out = run(Array(x.buffer, x.symbol, x.item))
        self.records = records
        node = Node(self, [x.node], [x.buffer])
        symbol, item, tokens = x.symbol, x.item, self.tokens

        def back(grad: Buffer) -> list[Buffer | None]:
            with self.at(self.place, tokens):
                again = self.leaf(Array(node.saved[0], symbol, item))
                return [self.backward(run(again), grad, again.node)]

        node.back = back
        return Array(out.buffer, out.symbol, out.item, node)

    def backward(self, out: Array, grad: Buffer, until: Node | None = None) -> Buffer | None:
        """The backward pass from `out`, whose gradient is given; returns the gradient of `until`."""
        assert out.node is not None
        grads, heap = {out.node.seq: grad}, [(-out.node.seq, out.node)]
        del out, grad
        while heap:
            node = heapq.heappop(heap)[1]
            grad = grads.pop(node.seq)
            if node is until:
                return grad
            at_head = node.place in (HEAD, HEAD_BACK)
            self.phase, self.place = ("loss", HEAD_BACK) if at_head else ("backward", node.place)
            self.compare()
            received = node.back(grad)
            node.back = lambda _: []
            node.saved.clear()
            del grad
            while received:
                parent, one = node.parents[len(received) - 1], received.pop()
                if parent is None or one is None:
                    continue
                if parent.seq not in grads:
                    grads[parent.seq] = one
                    heapq.heappush(heap, (-parent.seq, parent))
                elif grads[parent.seq].shared:
                    # torch adds in place to a gradient that nobody else has.
                    grads[parent.seq] = self.hold(one.n_bytes)
                del one
        return None


def saved(out: Array, what: str) -> Counter[tuple[str, str]]:
    """(place, text) → bytes of what the graph behind `out` has saved of this kind, each buffer once."""
    found: Counter[tuple[str, str]] = Counter()
    seen: set[int] = set()
    counted: set[int] = set()
    nodes = [out.node] if out.node else []
    while nodes:
        node = nodes.pop()
        if node.seq in seen:
            continue
        seen.add(node.seq)
        for buffer in node.saved:
            if buffer.what == what and id(buffer) not in counted:
                counted.add(id(buffer))
                found[(node.place, buffer.text)] += buffer.n_bytes
        nodes += [parent for parent in node.parents if parent]
    return found
