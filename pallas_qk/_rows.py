"""What one call reads, does and writes, as data: the file that knows the forms of a call.

T num_tokens, Hq num_q_heads, Hkv num_kv_heads, D head_dim, R rotary_dim. A row is one head of one token, D elements.
Rows of one kind are treated alike, and a form of a call is a few kinds of rows. What depends on the form derives from
them: shapes, types, the axes that may be sharded, what a result depends on, and where a kernel reads and writes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_qk import _cache_axes
from pallas_qk._cache_axes import Slots
from pallas_qk._options import Options, RotationName, Spec


class Scale(NamedTuple):
    """What rows are divided by on their way to codes of 8 bits."""

    array: str  # a field of Inputs
    per_head: bool  # whether its elements are those of the heads; else it has one
    first: int = 0  # the element of head 0, where it has one for each


class Place(NamedTuple):
    """Where row (token, head) starts in a flat array: first + head * h + token * t, in elements.

    With slots, the token's slot says where it lies in the place of `token`, or that it lies nowhere.
    """

    array: str  # a field of Inputs, and of Gradients, or of Outputs
    head: int  # from a head to the next
    token: int  # from a token to the next
    first: int = 0  # of head 0 of token 0
    slots: Slots | None = None
    scale: Scale | None = None  # None: rows are cast to the array's dtype, where it is another

    def ahead(self, heads: int) -> "Place":
        """That of the rows so many heads further on."""
        scale = None if self.scale is None else self.scale._replace(first=self.scale.first + heads)
        return self._replace(first=self.first + heads * self.head, scale=scale)


class Rows(NamedTuple):
    """Rows of one kind."""

    heads: str  # "q" or "k": the axis of heads, the programs that take the rows, and what may be sharded
    source: Place
    # Empty: XLA reads the rows where they lie. Mosaic GPU alone stores by the numbers in them.
    targets: tuple[Place, ...]
    normed: bool = False  # else the rows are copied as they are
    weight: str | None = None  # of the norm, a field of Inputs; None: it has none
    # Frequency j < R/2 rotates elements j and j + R/2, or of pairs 2j and 2j + 1; None: the rows are not rotated.
    rotation: RotationName | None = None
    # The result is the array at the source, and its cotangent another one, which has these rows where their gradient
    # belongs. Its other elements mean nothing, and nothing reads them.
    handed_on: bool = False

    def ahead(self, heads: int) -> "Rows":
        """The rows so many heads further on."""
        targets = tuple(place.ahead(heads) for place in self.targets)
        return self._replace(source=self.source.ahead(heads), targets=targets)


class Inputs(NamedTuple):
    """What the op reads; None where a call has no such array. A tree may also say something of each array."""

    q: Any  # (T, Hq, D); with gates (T, Hq, 2*D), each head [q | gate]; packed (T, elements of [q heads | k | v])
    k: Any  # (T, Hkv, D); None where it lies in a packed q, or q is alone
    q_weight: Any  # (D,)
    k_weight: Any  # (D,)
    cos_sin_cache: Any  # (max_pos, R); without positions (T, R), the row of each token; None where nothing is rotated
    positions: Any  # (1 or 3, T)
    v: Any = None  # (T, Hkv, D); None where it lies in a packed q, or a call has none
    k_cache: Any = None  # k's KV cache, which may hold v too
    v_cache: Any = None  # v's
    slots: Any = None  # (T,) the slot of each token in the cache
    layer: Any = None  # (1,) the layer of the cache, where it has several
    k_scale: Any = None  # (1,) or (Hkv,), of a cache of 8 bits
    v_scale: Any = None


class Outputs(NamedTuple):
    """What the op returns, and the cotangents of rows; None where a call has no such rows or no cache."""

    q: Any = None  # (T, Hq, D)
    k: Any = None  # (T, Hkv, D)
    v: Any = None  # (T, Hkv, D)
    gate: Any = None  # (T, Hq, D)
    k_cache: Any = None  # as in Inputs
    v_cache: Any = None


class Product(NamedTuple):
    """What the product of attention's result with sigmoid(gate) takes and gives next to `Inputs.q`, which has the gate.

    None where an operand or a result has no such array.
    """

    q: Any = None  # `Inputs.q`, its tangent, or its cotangent: the gate's rows, and what nobody reads
    attended: Any = None  # (T, Hq, D), or its tangent or cotangent
    product: Any = None  # (T, Hq, D), or its cotangent


class Gradients(NamedTuple):
    """What the backward returns; of each array what `Inputs` says. Weights: see `Options.round_dweights`."""

    q: Any
    k: Any
    v: Any
    q_weight: Any
    k_weight: Any


CACHES = ("k_cache", "v_cache")  # of Inputs, which Outputs has again
WEIGHTS = ("q_weight", "k_weight")  # of Inputs and Gradients


class Call(NamedTuple):
    """What one call fixes besides its arrays."""

    options: Options
    implementation: str | None


def rows_of(
    options: Options, num_q_heads: int, num_kv_heads: int, head_dim: int, cache_shape: Sequence[int] | None = None
) -> dict[str, Rows]:
    """Each kind of rows, by its field in Outputs."""
    d, kv_width, rotation = head_dim, num_kv_heads * head_dim, options.rotation
    q_weight, k_weight = ("q_weight", "k_weight") if options.head_dim is None else (None, None)
    q_head = d if options.gate is None else 2 * d
    q_width = num_q_heads * q_head
    if options.packed is None:
        q, k = Place("q", q_head, q_width), Place("k", d, kv_width)
        v = Place("v", d, kv_width) if options.separate_v else None
    else:
        token = q_width + 2 * kv_width
        q, k, v = (
            Place("q", q_head, token),
            Place("q", d, token, first=q_width),
            Place("q", d, token, first=q_width + kv_width),
        )
    rows = {
        "q": Rows("q", q, (Place("q", d, num_q_heads * d),), True, q_weight, rotation),
    }
    if not options.q_alone:
        rows["k"] = Rows("k", k, (Place("k", d, kv_width),) if options.return_kv else (), True, k_weight, rotation)
    if v is not None:
        rows["v"] = Rows("k", v, (Place("v", d, kv_width),) if options.return_kv else (), options.v_norm)
    if options.gate is not None:
        targets = (Place("gate", d, num_q_heads * d),) if options.gate == "copied" else ()
        rows["gate"] = Rows("q", q._replace(first=d), targets, handed_on=options.gate == "handed_on")
    if options.cache_axes:
        for name, place in _places_in_cache(options, cache_shape, d).items():
            rows[name] = rows[name]._replace(targets=(*rows[name].targets, place))
    return rows


def _places_in_cache(options: Options, shape: Sequence[int] | None, head_dim: int) -> dict[str, Place]:
    """Of k and v. Without a shape every size is 1."""
    cache_axes = options.cache_axes
    strides, slots = _cache_axes.strides_of(cache_axes, shape or _cache_axes.unit_shape(cache_axes), head_dim)
    k = Place("k_cache", strides["h"], token=0, slots=slots)
    v = k._replace(first=strides["c"]) if "c" in strides else k._replace(array="v_cache")
    if options.scale_per_head is not None:
        of_k, of_v = options.scale_per_head
        k, v = k._replace(scale=Scale("k_scale", of_k)), v._replace(scale=Scale("v_scale", of_v))
    return {"k": k, "v": v}


def kinds_of(options: Options) -> dict[str, Rows]:
    """`rows_of` where what is read and done counts, and no size."""
    return rows_of(options, 1, 1, 1)


def sharing(rows: Mapping[str, Rows], heads: str) -> tuple[dict[str, Rows], dict[str, Rows]]:
    """The kinds of rows that share an axis of heads: those that are normalised, and those that are not."""
    shared = {name: kind for name, kind in rows.items() if kind.heads == heads}
    normed = {name: kind for name, kind in shared.items() if kind.normed}
    return normed, {name: kind for name, kind in shared.items() if not kind.normed}


def stored(rows: Mapping[str, Rows]) -> dict[str, Rows]:
    """The kinds of rows that a kernel's forward stores."""
    return {name: kind for name, kind in rows.items() if kind.targets}


def moved(rows: Mapping[str, Rows]) -> dict[str, Rows]:
    """The kinds of rows whose gradient a kernel's backward writes."""
    return {name: kind for name, kind in rows.items() if not kind.handed_on}


def weight_of(arrays: Inputs, kind: Rows) -> Any:
    """The weight of rows that are normalised, if they have one."""
    return None if kind.weight is None else getattr(arrays, kind.weight)


def head_dim_of(inputs: Inputs, options: Options) -> int:
    return inputs.q_weight.shape[0] if options.head_dim is None else options.head_dim


# Arrays and what lies in them.


class Source(NamedTuple):
    """An array that holds rows."""

    kinds: tuple[str, ...]  # of rows, in the order in which they lie there
    heads: str | None  # whose heads are an axis of it; None: those of several are packed into one axis
    head: int  # elements from a head to the next
    token: int  # elements from a token to the next


def sources_of(rows: Mapping[str, Rows]) -> dict[str, Source]:
    """The arrays that hold rows, q first."""
    kinds_in: dict[str, list[str]] = {}
    for name, kind in sorted(rows.items(), key=lambda item: item[1].source.first):
        kinds_in.setdefault(kind.source.array, []).append(name)
    sources = {}
    for array, names in kinds_in.items():
        place, heads = rows[names[0]].source, {rows[name].heads for name in names}
        sources[array] = Source(tuple(names), heads.pop() if len(heads) == 1 else None, place.head, place.token)
    return sources


def spec_of(inputs: Inputs, options: Options) -> Spec:
    """The sizes of a call of one device's arrays."""
    num_q_heads, num_kv_heads = options.packed or (inputs.q.shape[1], 0 if options.q_alone else inputs.k.shape[1])
    head_dim = head_dim_of(inputs, options)
    still_open = (size for x in jax.tree.leaves(inputs) for size in x.shape if not isinstance(size, int))
    return Spec(
        inputs.q.shape[0],
        num_q_heads,
        num_kv_heads,
        head_dim,
        options.rotary_dim,
        str(inputs.q.dtype),
        open_size=next(still_open, None),
        cache_shape=None if inputs.k_cache is None else inputs.k_cache.shape,
        cache_dtype=None if inputs.k_cache is None else str(inputs.k_cache.dtype),
        rotation=options.rotation,
        norm_order=options.norm_order,
    )


def rows_for(spec: Spec, options: Options) -> dict[str, Rows]:
    return rows_of(options, spec.num_q_heads, spec.num_kv_heads, spec.head_dim, spec.cache_shape)


def output_types(inputs: Inputs, options: Options) -> Outputs:
    """The types of what a kernel's forward writes; a cache's is its own."""
    spec = spec_of(inputs, options)
    heads = {"q": spec.num_q_heads, "k": spec.num_kv_heads}
    types = {}
    for kind in rows_for(spec, options).values():
        row = jax.ShapeDtypeStruct((spec.num_tokens, heads[kind.heads], spec.head_dim), inputs.q.dtype)
        for place in kind.targets:
            types[place.array] = row
            if place.slots is not None:
                cache = getattr(inputs, place.array)
                types[place.array] = jax.ShapeDtypeStruct(cache.shape, cache.dtype)
    return Outputs(**types)


def with_caches(inputs: Inputs, outputs: Outputs) -> tuple[Inputs, Outputs]:
    """The caches moved from the inputs to their place among the outputs, for what updates them there."""
    caches = {name: getattr(inputs, name) for name in CACHES}
    return inputs._replace(**dict.fromkeys(CACHES)), outputs._replace(**caches)


def on_rows(function: Callable[[Any], Any], outputs: Outputs) -> Outputs:
    """The outputs, with what `function` makes of it in the place of each array but a cache."""
    rows = {name: x for name, x in outputs._asdict().items() if x is not None and name not in CACHES}
    return outputs._replace(**{name: function(x) for name, x in rows.items()})


def empty(outputs: Outputs) -> Outputs:
    """The results of no tokens: arrays without elements in the place of types, and caches as they are."""
    made: Outputs = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x, outputs
    )
    return made


def with_handed_on(outputs: Outputs, inputs: Inputs, options: Options) -> Outputs:
    """The outputs with the arrays that are inputs themselves."""
    kinds = kinds_of(options).items()
    return outputs._replace(**{name: getattr(inputs, kind.source.array) for name, kind in kinds if kind.handed_on})


def differentiated(inputs: Inputs) -> Gradients:
    """The arrays whose gradients the backward returns."""
    return Gradients(*(getattr(inputs, name) for name in Gradients._fields))


def gradient_types(inputs: Inputs, options: Options) -> Gradients:
    """The types of what a kernel's backward writes."""
    types: Gradients = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), differentiated(inputs))
    if options.round_dweights:
        return types
    return types._replace(**{name: x.update(dtype=jnp.float32) for name, x in weights_in(types).items()})


def product_types(inputs: Inputs, operands: Product) -> Product:
    """The types of the cotangents that `_reference.gate_backward` gives."""
    return Product(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (inputs.q, operands.attended)))


def weights_in(arrays: Gradients) -> dict[str, Any]:
    """Those of the weights, by name."""
    return {name: x for name in WEIGHTS if (x := getattr(arrays, name)) is not None}


def flat_output_types(inputs: Inputs, options: Options) -> Outputs:
    """The types of all results, of rows too that no kernel writes, in arrays flat in heads; a cache's is its own."""
    head_dim, kinds = head_dim_of(inputs, options), kinds_of(options)
    num_heads: dict[str, Any] = dict(zip(("q", "k"), options.packed or (None, None), strict=True))
    for array, source in sources_of(kinds).items():
        if source.heads is not None:
            num_heads[source.heads] = getattr(inputs, array).shape[-1] // (len(source.kinds) * head_dim)
    lead = inputs.q.shape[:-1]

    def type_of(array: str, kind: Rows) -> jax.ShapeDtypeStruct:
        if array in CACHES:
            cache = getattr(inputs, array)
            return jax.ShapeDtypeStruct(cache.shape, cache.dtype)
        return jax.ShapeDtypeStruct((*lead, num_heads[kind.heads] * head_dim), inputs.q.dtype)

    types = [type_of(array, written[0]) for array, written in kinds_in_outputs(options).items()]
    return with_handed_on(as_outputs(options, types), inputs, options)


def as_outputs(options: Options, leaves: Sequence[Any]) -> Outputs:
    """What the op returns, rows too that no kernel writes."""
    return Outputs(**dict(zip(kinds_in_outputs(options), leaves, strict=True)))


def kinds_in_outputs(options: Options) -> dict[str, list[Rows]]:
    """The kinds of rows in each of Outputs, in its order; those that no kernel writes are one of their own."""
    written: dict[str, list[Rows]] = {}
    for name, kind in kinds_of(options).items():
        for array in [place.array for place in kind.targets] or [name]:
            written.setdefault(array, []).append(kind)
    return {array: written[array] for array in Outputs._fields if array in written}


def as_gradients(options: Options, leaves: Sequence[Any]) -> Gradients:
    """The arrays that have rows, and the weights."""
    kinds = kinds_of(options)
    names = {*sources_of(kinds), *(kind.weight for kind in kinds.values())}
    given = [name for name in Gradients._fields if name in names]
    return Gradients(**dict.fromkeys(Gradients._fields) | dict(zip(given, leaves, strict=True)))


# What results depend on.


def read_by_outputs(options: Options, *trees: Inputs) -> Outputs:
    """What each output depends on: inputs, and the tangents of inputs."""
    x = Inputs(*zip(*trees, strict=True))

    def read(array: str, kinds: list[Rows]) -> tuple[Any, ...]:
        found: tuple[Any, ...] = getattr(x, array) + x.slots + x.layer if array in CACHES else ()
        for kind in kinds:
            found += getattr(x, kind.source.array)
            if kind.weight is not None:
                found += getattr(x, kind.weight)
            if kind.rotation is not None:
                found += x.cos_sin_cache + x.positions
            for place in kind.targets:
                if place.array == array and place.scale is not None:
                    found += getattr(x, place.scale.array)
        return found

    return as_outputs(options, [read(*item) for item in kinds_in_outputs(options).items()])


def read_by_gradients(options: Options, inputs: Inputs, cotangents: Outputs) -> Gradients:
    """What each gradient depends on."""
    reads: dict[str, tuple[Any, ...]] = dict.fromkeys(Gradients._fields, ())
    for name, kind in kinds_of(options).items():
        cotangent = getattr(cotangents, name)
        if not kind.normed:
            reads[kind.source.array] += (cotangent,)
            continue
        read = cotangent, getattr(inputs, kind.source.array), inputs.cos_sin_cache, inputs.positions
        if kind.weight is not None:
            reads[kind.weight] += read
        reads[kind.source.array] += (*read, weight_of(inputs, kind))
    return Gradients(**reads)


# Axes by name: "..." are the leading ones, "q" and "k" heads times D, "q*2" heads times two rows of D. Those of a cache
# are called as `_cache_axes` does, "k_cache_h" for heads, and the heads of scales "scale_h".


def axes(options: Options, *trees: Any) -> tuple[Any, ...]:
    """The axes of each array of the trees, the first of which is Inputs; another Inputs holds tangents."""
    names: dict[str, str | None] = {"k": None, "v": None}
    for array, source in sources_of(kinds_of(options)).items():
        if source.heads is None:
            names[array] = "... packed"
        else:
            rows_per_head = len(source.kinds)
            names[array] = f"... {source.heads}" if rows_per_head == 1 else f"... {source.heads}*{rows_per_head}"
    q, k = names["q"], names["k"]
    table = "... rotary" if trees[0].positions is None else "position rotary"
    groups = _cache_axes.groups(options.cache_axes)
    k_cache, v_cache = (" ".join(f"{array}_{group}" for group in groups) for array in CACHES)
    k_scale, v_scale = ("scale_h" if per_head else "scale" for per_head in options.scale_per_head or (False, False))
    in_cache = k_cache, v_cache, "...", "layer", k_scale, v_scale
    gate = q if options.gate == "handed_on" else "... q"
    of = {
        Inputs: Inputs(q, k, "lane", "lane", table, "row ...", names["v"], *in_cache),
        Outputs: Outputs("... q", "... k", "... k", gate, k_cache, v_cache),
        Product: Product(q, "... q", "... q"),
        Gradients: Gradients(q, k, names["v"], "lane", "lane"),
    }

    def of_tree(tree: Any) -> Any:
        present = zip(tree, of[type(tree)], strict=True)
        return type(tree)(*(None if array is None else its_axes for array, its_axes in present))

    return tuple(map(of_tree, trees))


def split_axis(name: str) -> tuple[str, int]:
    """The heads of an axis of `axes`, and the rows of each: "q*2" is ("q", 2)."""
    heads, _, rows_per_head = name.partition("*")
    return heads, int(rows_per_head or 1)


def on_heads(function: Callable[..., Any], options: Options, *operands: Any, flatten: bool = False) -> Any:
    """The results, flat in heads, of a function of arrays (*lead, heads, rows of D); with `flatten`, of (T, …)."""
    inputs = operands[0]
    head_dim, lead = head_dim_of(inputs, options), inputs.q.shape[:-1]
    tokens = (math.prod(lead),) if flatten else lead

    def split(names: str, x: Any) -> Any:
        *first, last = names.split()
        if names == "...":
            return x.reshape(tokens)
        if first == ["..."]:
            heads, rows_per_head = split_axis(last)
            width = rows_per_head * head_dim
            return x.reshape(*tokens, *((x.shape[-1] // width, width) if heads in ("q", "k") else x.shape[-1:]))
        return x.reshape(x.shape[0], *tokens) if last == "..." else x

    results = function(*jax.tree.map(split, axes(options, *operands), operands), options=options)

    def merge(names: str, x: Any) -> Any:
        return x.reshape(*lead, math.prod(x.shape[len(tokens) :])) if names.startswith("...") else x

    return jax.tree.map(merge, axes(options, inputs, results)[1], results)
