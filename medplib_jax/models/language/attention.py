"""Self-attention of the decoder: rotary positions, grouped key/value heads, KV cache."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from medplib_jax.batch import Array
from medplib_jax.config.experiment import ShardingConfig
from medplib_jax.config.model import LlmConfig, LoraConfig
from medplib_jax.models.language.heads import from_heads, into_heads
from medplib_jax.models.layers import Linear, Rngs, softmax_average
from medplib_jax.models.precision import product
from medplib_jax.models.quantize import quantize_rows
from medplib_jax.models.rng import split_rng
from medplib_jax.models.target import is_for_gpu, is_for_tpu, is_simulated, target_device
from medplib_jax.parallel.sharding import activation_axes, mesh_axes, row_axes

HIDDEN = -1e30  # added to the score of a key that a query may not see; absorbs any score
QUERY_BLOCK = 128
SPLASH_LANES = 128  # head widths and block sides are multiples of a TPU register's lanes


@flax.struct.dataclass
class Narrow:
    """Keys or values of 8 bits: integers, and a scale for each position of each head."""

    integers: Int[Array, "B G ..."]
    scale_BxGxS: Float[Array, "B G S"]


@flax.struct.dataclass
class KVCache:
    """Keys (rotated) and values, one array per layer, or one `Narrow`.

    Their axes have the order in which decoding multiplies them, so that nothing is transposed per token. Row b holds
    `length_B[b]` positions. What lies beyond is overwritten later.
    """

    k: tuple[Float[Array, "B G K S"] | Narrow, ...]
    v: tuple[Float[Array, "B G S K"] | Narrow, ...]
    length_B: Int[Array, " B"]
    ntk_B: Int[Array, " B"] | None = (
        None  # of each row's prompt, see `long_context`; None where the model does not scale
    )

    @property
    def room(self) -> int:
        """Positions that a row may hold."""
        return jax.tree.leaves(self.v)[0].shape[2]


def rotary_frequencies(head_dim: int, theta: float) -> np.ndarray:
    """theta^(-2i/K), float32 [K/2] (Su et al. 2021, eq. 15), rounded where LLaMA's `rotary_emb.inv_freq` is.

    The power is taken on the host: a TPU's is less exact.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(1) / (theta ** exponents.astype(np.float64)).astype(np.float32)


def rotary_tables(positions_BxL: Array, frequencies: np.ndarray | Array) -> tuple[Array, Array]:
    """cos and sin [B, L, K/2] in float32 of position * frequency, [K/2] or of each row [B, 1, K/2]."""
    angles = positions_BxL[..., None].astype(jnp.float32) * frequencies
    tables = jnp.cos(angles), jnp.sin(angles)
    if target_device(positions_BxL).platform != "cpu":
        return tables
    # XLA for CPUs would compute the cosines anew for every head of every layer: it fuses them into what reads them,
    # an optimization barrier notwithstanding. The result of a product it keeps.
    identity = jnp.eye(frequencies.shape[-1])
    return tuple(product(table, identity) for table in tables)


def rotate(x_BxLxHxK: Array, tables: tuple[Array, Array]) -> Array:
    """Rotates channel i with channel i + K/2 (LLaMA's rotate-half layout), in float32; keeps x's dtype."""
    cos, sin = (table[:, :, None, :] for table in tables)
    if is_for_tpu(x_BxLxHxK):
        return _rotate_by_product(x_BxLxHxK, cos, sin)
    first, second = jnp.split(x_BxLxHxK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BxLxHxK.dtype)


@jax.custom_vjp
def _rotate_by_product(x_BxLxHxK: Array, cos: Array, sin: Array) -> Array:
    """`rotate` for a TPU, whose registers hold a whole head: halves of it would all be moved through its memory.

    The product with 0, 1 and -1 puts every channel exactly where its partner is. The gradient rotates back.
    """
    half = x_BxLxHxK.shape[-1] // 2
    partner_KxK = jnp.asarray(np.kron([[0, 1], [-1, 0]], np.eye(half)), x_BxLxHxK.dtype)
    partner = product(x_BxLxHxK, partner_KxK, jnp.float32)
    cos, sin = (jnp.concatenate([table, table], axis=-1) for table in (cos, sin))
    return (x_BxLxHxK.astype(jnp.float32) * cos + partner * sin).astype(x_BxLxHxK.dtype)


_rotate_by_product.defvjp(
    lambda x, cos, sin: (_rotate_by_product(x, cos, sin), (cos, sin)),
    lambda tables, dy: (_rotate_by_product(dy, tables[0], -tables[1]), None, None),
)


def segment_positions(segment_BxL: Array) -> Array:
    """Positions that start at 0 with every segment (a run of one number), int32 [B, L]."""
    index_L = jnp.arange(segment_BxL.shape[1], dtype=jnp.int32)
    begins_BxL = jnp.pad(segment_BxL[:, 1:] != segment_BxL[:, :-1], ((0, 0), (1, 0)))
    return index_L - jax.lax.cummax(jnp.where(begins_BxL, index_L, 0), axis=1)


def attend(
    q_BxLxHxK: Array,
    k_BxSxGxK: Array,
    v_BxSxGxK: Array,
    *,
    query_position_BxL: Array,
    key_valid_BxS: Array | None = None,
    segments: tuple[Array, Array] | None = None,
) -> Array:
    """Causal attention: a query sees the keys at index <= its position that are valid. Softmax in float32; G divides H.

    With segments (of the queries [B, L], of the keys [B, S]) it sees those of its own segment only.

    A row that may see no key at all gets the mean of all values, never NaN. Returns [B, L, H, K] in q's dtype.
    """
    visible_BxLxS = jnp.arange(k_BxSxGxK.shape[1]) <= query_position_BxL[..., None]
    if key_valid_BxS is not None:
        visible_BxLxS &= key_valid_BxS[:, None, :]
    if segments is not None:
        visible_BxLxS &= segments[0][:, :, None] == segments[1][:, None, :]
    k_BxGxKxS, v_BxGxSxK = rearrange(k_BxSxGxK, "B S G K -> B G K S"), rearrange(v_BxSxGxK, "B S G K -> B G S K")
    return _attend_visible(q_BxLxHxK, k_BxGxKxS, v_BxGxSxK, visible_BxLxS)


def begin_cache(k_BxLxGxK: Array, v_BxLxGxK: Array, length: int, narrow: bool) -> tuple[Array | Narrow, Array | Narrow]:
    """One layer's cache of `length` positions that begins with these; `narrow`: in 8 bits."""
    if narrow:
        (k_BxLxGxK, *k_scale), (v_BxLxGxK, *v_scale) = quantize_rows(k_BxLxGxK), quantize_rows(v_BxLxGxK)
    beyond = (0, length - k_BxLxGxK.shape[1])
    k_BxGxKxL, v_BxGxLxK = rearrange(k_BxLxGxK, "B L G K -> B G K L"), rearrange(v_BxLxGxK, "B L G K -> B G L K")
    k = jnp.pad(k_BxGxKxL, ((0, 0), (0, 0), (0, 0), beyond))
    v = jnp.pad(v_BxGxLxK, ((0, 0), (0, 0), beyond, (0, 0)))
    if not narrow:
        return k, v
    scales = (jnp.pad(rearrange(x, "B L G -> B G L"), ((0, 0), (0, 0), beyond)) for x in (*k_scale, *v_scale))
    return tuple(Narrow(x, scale) for x, scale in zip((k, v), scales, strict=True))


def extend_cache(
    k: Array | Narrow, v: Array | Narrow, k_BxLxGxK: Array, v_BxLxGxK: Array, index_BxL: Array
) -> tuple[Array | Narrow, Array | Narrow]:
    """One layer's cache with the keys and values of L new positions written at `index_BxL`."""
    if not isinstance(k, Narrow):
        return _extend(k, v, k_BxLxGxK, v_BxLxGxK, index_BxL)
    (k_BxLxGxK, k_scale_BxLxG), (v_BxLxGxK, v_scale_BxLxG) = quantize_rows(k_BxLxGxK), quantize_rows(v_BxLxGxK)
    integers = _extend(k.integers, v.integers, k_BxLxGxK, v_BxLxGxK, index_BxL)
    wide = (k.scale_BxGxS[:, :, None], v.scale_BxGxS[..., None], k_scale_BxLxG[..., None], v_scale_BxLxG[..., None])
    k_scale, v_scale = _extend(*wide, index_BxL)
    return Narrow(integers[0], k_scale[:, :, 0]), Narrow(integers[1], v_scale[..., 0])


def _extend(
    k_BxGxKxS: Array, v_BxGxSxK: Array, k_BxLxGxK: Array, v_BxLxGxK: Array, index_BxL: Array
) -> tuple[Array, Array]:
    """All heads of a position are one write. Written value by value, sixteen rows take six times as long on a CPU."""
    k_BxLxGxK, v_BxLxGxK = k_BxLxGxK.astype(k_BxGxKxS.dtype), v_BxLxGxK.astype(v_BxGxSxK.dtype)
    if len(k_BxLxGxK) == 1:  # without the axis of rows, see Decoder.decode
        start = index_BxL[0, 0]
        k_GxKxL, v_GxLxK = rearrange(k_BxLxGxK[0], "L G K -> G K L"), rearrange(v_BxLxGxK[0], "L G K -> G L K")
        k_GxKxS = jax.lax.dynamic_update_slice(k_BxGxKxS[0], k_GxKxL, (0, 0, start))
        return k_GxKxS[None], jax.lax.dynamic_update_slice(v_BxGxSxK[0], v_GxLxK, (0, start, 0))[None]
    row_Bx1 = jnp.arange(k_BxLxGxK.shape[0])[:, None]
    k_BxGxKxS = k_BxGxKxS.at[row_Bx1, :, :, index_BxL].set(k_BxLxGxK)
    return k_BxGxKxS, v_BxGxSxK.at[row_Bx1, :, index_BxL].set(v_BxLxGxK)


def attend_cached(q_BxLxHxK: Array, k: Array | Narrow, v: Array | Narrow, query_position_BxL: Array) -> Array:
    """`attend` to a cache, whose rows hold no gaps: what lies at or before a query's position is valid."""
    scales = (k.scale_BxGxS, v.scale_BxGxS) if isinstance(k, Narrow) else None
    k_BxGxKxS, v_BxGxSxK = (x.integers if scales else x for x in (k, v))
    visible = jnp.arange(k_BxGxKxS.shape[3]) <= query_position_BxL[..., None]
    return _attend_visible(q_BxLxHxK, k_BxGxKxS, v_BxGxSxK, visible, scales)


def _attend_visible(q_BxLxHxK, k_BxGxKxS, v_BxGxSxK, visible_BxLxS, scales=None):
    """`scales` [B, G, S] of keys and of values of 8 bits: they are multiplied where they are few."""
    L, K, G = q_BxLxHxK.shape[1], q_BxLxHxK.shape[3], k_BxGxKxS.shape[1]
    k_BxGxKxS, v_BxGxSxK = k_BxGxKxS.astype(q_BxLxHxK.dtype), v_BxGxSxK.astype(q_BxLxHxK.dtype)
    hidden_BxLxS = jnp.where(visible_BxLxS, 0.0, HIDDEN)
    q_BxGxRLxK = rearrange(q_BxLxHxK * K**-0.5, "B L (G R) K -> B G (R L) K", G=G)  # R query heads share a key head
    scores = product(q_BxGxRLxK, k_BxGxKxS, jnp.float32)
    if scales:
        scores *= scales[0][:, :, None]
    scores += jnp.tile(hidden_BxLxS, (1, q_BxGxRLxK.shape[2] // L, 1))[:, None]
    y_BxGxRLxK = softmax_average(scores, v_BxGxSxK, scales and scales[1][:, :, None])
    return rearrange(y_BxGxRLxK, "B G (R L) K -> B L (G R) K", L=L)


def attend_within(
    q_BxLxHxK: Array,
    k_BxLxGxK: Array,
    v_BxLxGxK: Array,
    valid_BxL: Array,
    segment_BxL: Array | None = None,
    *,
    rules: ShardingConfig | None = None,
) -> Array:
    """Causal attention within rows padded on the right, or within the segments of a row: `attend` without a cache.

    For a TPU by the splash attention kernel and for a GPU by cuDNN's, which never keep scores. The values are the same,
    except at padding, which then sees other padding too. `rules` say over which devices of a mesh the heads are spread.
    """
    q, k, v = q_BxLxHxK, k_BxLxGxK, v_BxLxGxK
    if is_for_tpu(q) and q.shape[3] % SPLASH_LANES == 0:
        return _splash(q, k, v, valid_BxL.astype(jnp.int32) if segment_BxL is None else segment_BxL, rules)
    if is_for_gpu(q) and segment_BxL is None and suits_cudnn(q):
        return fused_attention(*_with_own_heads(q, k, v, rules), "cudnn")
    return _attend_blocks(q, k, v, valid_BxL, segment_BxL)


def _with_own_heads(q, k, v, rules):
    """Queries, keys and values [B, L, heads, K], every device with the keys of its own query heads: kernels need it.

    It is so where the rules spread query heads and key heads alike. Else each query head gets a copy of its key head.
    """
    mesh = jax.typeof(q).sharding.mesh
    if mesh.size <= 1:
        return q, k, v
    if mesh_axes(rules, "heads") != mesh_axes(rules, "kv_heads"):
        k, v = (repeat(x, "B L G K -> B L (G R) K", R=q.shape[2] // x.shape[2]) for x in (k, v))
    rows = row_axes(len(q), mesh)
    placed = NamedSharding(mesh, PartitionSpec(rows, None, activation_axes(rules, "heads", rows)))
    return tuple(jax.lax.with_sharding_constraint(x, placed) for x in (q, k, v))


def suits_cudnn(q_BxLxHxK: Array) -> bool:
    """Whether cuDNN's attention takes these queries."""
    return (
        q_BxLxHxK.dtype in (jnp.bfloat16, jnp.float16)
        and q_BxLxHxK.shape[1] % 64 == 0
        and q_BxLxHxK.shape[3] in (64, 128)
    )


def fused_attention(q_BxLxHxK: Array, k_BxLxGxK: Array, v_BxLxGxK: Array, implementation: str) -> Array:
    """`jax.nn.dot_product_attention`, causal. Padding needs no mask: it is on the right, where causality hides it."""
    y = jax.nn.dot_product_attention(q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, is_causal=True, implementation=implementation)
    return checkpoint_name(y, "attention")


def _attend_blocks(q, k, v, valid_BxL, segment_BxL):
    """Queries in blocks, each with the keys up to its own end, which leaves out most scores that causality hides."""
    L, blocks = q.shape[1], []
    for start in range(0, L, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, L)
        segments = None if segment_BxL is None else (segment_BxL[:, start:stop], segment_BxL[:, :stop])
        position = jnp.arange(start, stop)[None]
        blocks.append(
            attend(
                q[:, start:stop],
                k[:, :stop],
                v[:, :stop],
                query_position_BxL=position,
                key_valid_BxS=valid_BxL[:, :stop],
                segments=segments,
            )
        )
    return jnp.concatenate(blocks, axis=1)


def splash_block(length: int) -> int:
    """Side of the kernel's blocks of scores: large for the matrix unit, yet small enough that causal skipping pays."""
    return 512 if length % 512 == 0 else min(256, length + -length % SPLASH_LANES)


def _keys_at_once(q_BxHxLxK: Array, block: int) -> int:
    """Keys of a block of the gradients' kernel, which writes the queries' gradients once per block, to be summed.

    Two blocks in one are less to move and more to compute. A v6e computes 560 FLOPs while it reads a byte, twice as
    many as others.
    """
    length, kind = q_BxHxLxK.shape[2], target_device(q_BxHxLxK).device_kind
    return 2 * block if kind.startswith("TPU v6") and length % (2 * block) == 0 else block


def _splash(q, k, v, segment_BxL, rules):
    """Every device works on its rows and heads: the compiler cannot partition a kernel."""
    length, mesh = q.shape[1], jax.typeof(q).sharding.mesh
    beyond = -length % splash_block(length)
    q, k, v = _with_own_heads(q, k, v, rules)
    q, k, v = (rearrange(x, "B L H K -> B H L K") for x in (q * q.shape[3] ** -0.5, k, v))
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, beyond), (0, 0))) for x in (q, k, v))
    segment_BxL = jnp.pad(segment_BxL, ((0, 0), (0, beyond)))
    if mesh.size <= 1:
        y = _splash_local(q, k, v, segment_BxL)
    else:
        rows = row_axes(q.shape[0], mesh)
        by_head = PartitionSpec(rows, activation_axes(rules, "heads", rows))
        in_specs = (by_head, by_head, by_head, PartitionSpec(rows))
        run = jax.shard_map(_splash_local, mesh=mesh, in_specs=in_specs, out_specs=by_head, check_vma=False)
        y = run(q, k, v, segment_BxL)
    return rearrange(y[:, :, :length], "B H L K -> B L H K")


def _splash_local(q_BxHxLxK, k_BxGxLxK, v_BxGxLxK, segment_BxL):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, length = q_BxHxLxK.shape[1:3]
    block = splash_block(length)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=_keys_at_once(q_BxHxLxK, block),
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        interpret=not is_for_tpu(q_BxHxLxK),
    )
    rows = q_BxHxLxK, k_BxGxLxK, v_BxGxLxK, splash.SegmentIds(segment_BxL, segment_BxL)
    if is_simulated():  # jax 0.10's interpreter of TPU kernels does not know the axis that vmap adds to their grid
        return jax.lax.map(lambda row: kernel(*row), rows)
    return jax.vmap(kernel)(*rows)


def _kept(x_BxLxHxK: Array, name: str) -> Array:
    """The array by the name that policies know it by; for a TPU in the order of axes in which its kernel takes it."""
    if not is_for_tpu(x_BxLxHxK):
        return checkpoint_name(x_BxLxHxK, name)
    return rearrange(checkpoint_name(rearrange(x_BxLxHxK, "B L H K -> B H L K"), name), "B H L K -> B L H K")


@dataclasses.dataclass(frozen=True)
class Positions:
    """What attention needs to know of the positions of a pass:

    Rotary `tables`, and a factor on each query [B, L], None for none.
    """

    tables: tuple[Array, Array]
    query_scale_BxL: Array | None = None


class Attention(nnx.Module):
    """Self-attention: LLaMA's without biases, or Qwen's, whose one projection with a bias yields query, key and value
    of each head side by side (`llm.fused_qkv`), so that heads can lie on several devices.
    """

    def __init__(self, llm: LlmConfig, lora: LoraConfig, rngs: Rngs):
        D, K = llm.hidden_size, llm.head_dim

        def linear(name, out_heads, axis, bias=False):
            return Linear(
                D, out_heads * K, axes=("embed", axis), bias=bias, rngs=rngs, lora=lora, lora_rank=lora.rank_of(name)
            )

        self.fused = llm.fused_qkv
        if self.fused:
            self.qkv = linear("qkv", 3 * llm.num_heads, "heads", bias=True)
        else:
            self.q = linear("q", llm.num_heads, "heads")
            self.k = linear("k", llm.num_kv_heads, "kv_heads")
            self.v = linear("v", llm.num_kv_heads, "kv_heads")
        self.o = Linear(
            llm.num_heads * K, D, axes=("heads", "embed"), bias=False, rngs=rngs, lora=lora, lora_rank=lora.rank_of("o")
        )
        self.head_dim = K

    def project(self, x_BxLxD: Array, positions: Positions, rng: Array | None) -> tuple[Array, Array, Array]:
        """Queries and keys (both rotated) and values, [B, L, heads, K]."""
        q, k, v = self._heads(x_BxLxD, rng)
        q, k = rotate(q, positions.tables), rotate(k, positions.tables)
        if positions.query_scale_BxL is not None:
            q = (q * positions.query_scale_BxL[:, :, None, None]).astype(q.dtype)
        return _kept(q, "query"), _kept(k, "key"), _kept(v, "value")

    def _heads(self, x_BxLxD: Array, rng: Array | None):
        if self.fused:
            return rearrange(self.qkv(x_BxLxD, rng=rng), "b l (h c k) -> c b l h k", c=3, k=self.head_dim)
        return (
            into_heads(linear, x_BxLxD, self.head_dim, key)
            for linear, key in zip((self.q, self.k, self.v), split_rng(rng, 3), strict=True)
        )

    def output(self, y_BxLxHxK: Array, rng: Array | None) -> Array:
        return from_heads(self.o, y_BxLxHxK, rng)
