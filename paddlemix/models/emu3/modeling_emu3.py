# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The language model: token ids to logits. One causal Transformer; its attention is in attention.py.

A Llama-style decoder (Emu3: arXiv 2409.18869, section 2.3): RMSNorm before each block, rotary positions,
grouped-query attention, SwiGLU. Parameter names are the released checkpoint's.
"""

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.distributed.fleet.utils import recompute

from paddlemix.external_ops import operators
from paddlemix.external_ops.decoder_step import card_takes, decoder_step
from paddlemix.external_ops.few_rows_linear import FEW_ROWS, GROUP
from paddlemix.external_ops.fused_ln import fused_rms_norm
from paddlemix.external_ops.silu_and_mul import silu_and_mul
from paddlemix.paddle_private import is_untouched
from paddlemix.utils import InputError

from .attention import Mask, Rotary, allowed_keys, attend, count_positions
from .cache import KVCache
from .checkpoint import CheckpointMixin, dtype_name
from .configuration_emu3 import QUANTIZATIONS, Emu3Config
from .linear import Emu3Linear, SplitHead, normal
from .paddlenlp_generate import PaddleNLPGenerate, is_ids, kind_of
from .parallel import Part, share, times


class Emu3RMSNorm(nn.Layer):
    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = self.create_parameter([hidden_size], default_initializer=nn.initializer.Constant(1.0))
        self.eps = eps

    def forward(self, x):
        if x.dtype == paddle.float32:
            weight = self.weight if self.weight.dtype == x.dtype else self.weight.astype(x.dtype)
            return fused_rms_norm(x, weight, self.eps)[0]
        h = x.astype("float32")  # of 16 bits the original rounds before the weight comes in
        h = h * paddle.rsqrt((h * h).mean(axis=-1, keepdim=True) + self.eps)
        return self.weight.astype(x.dtype) * h.astype(x.dtype)


class SplitEmbedding(nn.Layer):
    """Of several processes each has some numbers of every token's embedding; all are gathered."""

    def __init__(self, config, ranks):
        super().__init__()
        self.ranks, self.own = ranks, share(config.hidden_size, ranks)
        self.shape = [config.vocab_size, config.hidden_size]  # of the whole
        shape = [config.vocab_size, config.hidden_size // ranks.count]
        self.weight = self.create_parameter(shape, default_initializer=normal(config))

    def forward(self, ids):
        return paddle.concat(self.ranks.gather_tensors(F.embedding(ids, self.weight)), axis=-1)

    def parts(self):
        return {"weight": Part(self.shape, columns=self.own)}


class Emu3Attention(nn.Layer):
    def __init__(self, config, layer, ranks=None):
        super().__init__()
        self.layer, self.config = layer, config
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        queries = keys = None
        if ranks:  # the queries that share a key head stay together
            own = share(kv_heads, ranks)
            queries, keys = times(own, heads // kv_heads * dim), times(own, dim)
        self.q_proj = Emu3Linear(config, config.hidden_size, heads * dim, rows=queries and (queries,))
        self.k_proj = Emu3Linear(config, config.hidden_size, kv_heads * dim, rows=keys and (keys,))
        self.v_proj = Emu3Linear(config, config.hidden_size, kv_heads * dim, rows=keys and (keys,))
        self.o_proj = Emu3Linear(config, heads * dim, config.hidden_size, columns=queries, ranks=ranks)

    def forward(self, x, rotary, mask, cache):
        by_head = [*x.shape[:2], -1, self.config.head_dim]
        query = rotary.apply(self.q_proj(x).reshape(by_head))
        key = rotary.apply(self.k_proj(x).reshape(by_head)).transpose([0, 2, 1, 3])
        value = self.v_proj(x).reshape(by_head).transpose([0, 2, 1, 3])
        if cache is not None:
            cache.write(self.layer, key, value, mask)  # in the cache's dtype
            if not mask.is_first:
                key, value = cache.read(self.layer, mask)
        dropout = self.config.attention_dropout if self.training else 0.0
        return self.o_proj(attend(query, key, value, mask, dropout))


class Emu3MLP(nn.Layer):
    def __init__(self, config, ranks=None):
        super().__init__()
        hidden, middle = config.hidden_size, config.intermediate_size
        unit = GROUP if config.quantized_dtype == "int4" else 1  # a group of inputs has one scale
        own = share(middle, ranks, unit) if ranks else None
        self.gate_proj = Emu3Linear(config, hidden, middle, rows=own and (own,))
        self.up_proj = Emu3Linear(config, hidden, middle, rows=own and (own,))
        self.down_proj = Emu3Linear(config, middle, hidden, columns=own, ranks=ranks)

    def forward(self, x):
        return self.down_proj(silu_and_mul(self.gate_proj(x), self.up_proj(x)))


class Emu3DecoderLayer(nn.Layer):
    def __init__(self, config, layer, ranks=None):
        super().__init__()
        self.config = config
        self.self_attn = Emu3Attention(config, layer, ranks)
        self.mlp = Emu3MLP(config, ranks)
        self.input_layernorm = Emu3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Emu3RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rotary, mask, cache=None):
        x = x + _dropout(self, self.self_attn(self.input_layernorm(x), rotary, mask, cache))
        return x + _dropout(self, self.mlp(self.post_attention_layernorm(x)))

    def _parts(self):
        """The norms and the linear layers, in the order of decoder_step."""
        attn, mlp = self.self_attn, self.mlp
        norms = self.input_layernorm, self.post_attention_layernorm
        return norms, (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)

    def is_plain(self):
        """Whether the layer is as it was made: then decoder_step computes the same."""
        if not (
            _is_plain(self, Emu3DecoderLayer)
            and _is_plain(self.self_attn, Emu3Attention)
            and _is_plain(self.mlp, Emu3MLP)
        ):
            return False
        norms, linears = self._parts()
        return (
            all(_is_plain(part, Emu3RMSNorm) and part.weight.dtype != paddle.float64 for part in norms)
            and all(_is_plain(part, Emu3Linear) and part.lora_A is None for part in linears)
            and len({part.weight.dtype for part in linears}) == len({part.eps for part in norms}) == 1
        )

    def has_step(self, x, cache):
        """Whether decoder_step computes the same of x, on the device that it is on."""
        if not self.is_plain():
            return False
        if x.place.is_cpu_place():
            return x.dtype == paddle.float32
        norms, linears = self._parts()
        key = cache.keys[self.self_attn.layer]
        return card_takes(x, [part.weight for part in norms], [part.weight for part in linears], key)

    def step(self, x, rotary, mask, cache):
        """What `forward` gives, by the compiled decoder_step."""
        norms, linears = self._parts()
        layer = self.self_attn.layer
        return decoder_step(
            x, [part.weight for part in norms], [part.weight for part in linears],
            None if linears[0].weight_scale is None else [part.weight_scale for part in linears],
            rotary.cos, rotary.sin, cache.keys[layer], cache.values[layer], mask.lengths(x.shape[0]),
            mask.row_slots, norms[0].eps, mask.padding,
        )  # fmt: skip


def _dropout(layer, x):
    """In training; the original's one probability is of attention, of what a layer adds and of embeddings."""
    return F.dropout(x, layer.config.attention_dropout) if layer.training else x


def _is_plain(layer, kind):
    """Of this very class, not in training, and nothing hooked in."""
    return type(layer) is kind and is_untouched(layer)


class Emu3Model(CheckpointMixin, nn.Layer):
    """The Transformer without its head: token ids to hidden states.

    It loads from a checkpoint of the whole model, and saves under the same names.

    Args:
        config: Emu3Config.
        ranks: parallel.TensorParallel: this process has a part of each linear layer, and every process calls the same
            methods in the same order. None is one process.
    """

    config_class = Emu3Config
    checkpoint_prefix = "model."
    dtypes = (*CheckpointMixin.dtypes, *QUANTIZATIONS)
    cpu_dtypes = ("float32", "bfloat16", *QUANTIZATIONS)
    tied_weights = {"lm_head.weight": None, "lm_head.weight_scale": None}
    repeated = {"num_hidden_layers": r"model\.layers\.(\d+)\."}

    def __init__(self, config, ranks=None):
        super().__init__()
        self.config, self.ranks = config, ranks
        if ranks and not config.tie_word_embeddings and config.hidden_size % ranks.count == 0:
            self.embed_tokens = SplitEmbedding(config, ranks)
        else:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, weight_attr=normal(config))
        self.layers = nn.LayerList([Emu3DecoderLayer(config, i, ranks) for i in range(config.num_hidden_layers)])
        self.norm = Emu3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.enable_recompute = False  # PaddleNLP's name for gradient checkpointing; its Trainer sets it

    @property
    def dtype(self):
        """The embedding's; on a CPU all is computed in float32."""
        return self.embed_tokens.weight.dtype

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None):
        """Hidden states after the last norm.

        Args:
            input_ids: int64 [batch, new]; or inputs_embeds [batch, new, hidden_size] in their place.
            attention_mask: [batch, length] with 0 at padding, length counting the cached tokens too; or four axes,
                as attention.allowed_keys takes them.
            position_ids: int64 [batch, new]. Left out, they count the tokens that are not padding.
            past_key_values: a KVCache, which the new tokens are added to.

        Returns:
            [batch, new, hidden_size]
        """
        batch, new = _input_shape(input_ids, inputs_embeds)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past = 0 if past_key_values is None else past_key_values.length
        length = past + new
        if past_key_values is not None:
            if length > past_key_values.max_length:
                raise InputError(
                    f"{length} tokens do not fit a cache of {past_key_values.max_length}: make a larger KVCache"
                )
            past_key_values.reserve(length)
        allowed = allowed_keys(attention_mask, batch, new, length)
        if past == 0 and allowed is not None and bool(allowed.all()):
            allowed = None  # nothing is masked: the causal mask alone can take flash attention
        if position_ids is None:
            position_ids = count_positions(allowed, past, new, batch)
        elif list(position_ids.shape) not in ([batch, new], [1, new]):
            raise InputError(f"position_ids must be [{batch}, {new}], got {list(position_ids.shape)}")
        x = _dropout(self, x)
        x = self._run(x, Rotary(self.config, position_ids, length), Mask(past, new, allowed), past_key_values)
        if past_key_values is not None:
            past_key_values.length = length
        return x

    def read_prompt(self, input_ids, past, length, slot, cache):
        """Put the keys and values of a part of one row's prompt into the cache.

        What is put there depends on the row's own tokens and on where its parts begin, and on nothing else.

        Args:
            input_ids: int64 [1, new].
            past: how many tokens of the row are in the cache.
            length: of the whole prompt.
            slot: the row's.
            cache: KVCache with capacity for the new tokens. Its lengths are neither read nor changed.
        """
        new = input_ids.shape[1]
        rotary = Rotary(self.config, count_positions(None, past, new, 1), length)
        self._run(self.embed_tokens(input_ids), rotary, Mask(past, new, slots=slot), cache)

    def step(self, input_ids, past, slots, cache):
        """Hidden states of new tokens of several rows, each after its own number of tokens.

        No shape and no Python number depends on how many there are, and nothing waits for the device: a CUDA graph of
        one call stands for those at other positions, until the cache grows.

        Args:
            input_ids: int64 [rows, new].
            past: int64 [rows], how many tokens of each row are in the cache.
            slots: int64 [rows]; None where row i is slot i.
            cache: KVCache with capacity for the new tokens. Its lengths are neither read nor changed.

        Returns:
            [rows, new, hidden_size]
        """
        mask = Mask(past, input_ids.shape[1], slots=slots)
        rotary = Rotary(self.config, mask.places, mask.places.astype("float64") + 1)
        return self._run(self.embed_tokens(input_ids), rotary, mask, cache)

    def _run(self, x, rotary, mask, cache):
        x = x.astype("float32") if x.place.is_cpu_place() else x
        has_step = cache is not None and self._has_step(x, mask, cache)
        if x.stop_gradient and self.enable_recompute and self.training:  # of a frozen embedding: recompute warns of it
            x = x.detach()
            x.stop_gradient = False
        for layer in self.layers:
            if has_step:
                x = layer.step(x, rotary, mask, cache)
            elif self.enable_recompute and self.training and cache is None:
                x = recompute(layer, x, rotary, mask, use_reentrant=False)  # reentrant, it skips frozen inputs
            else:
                x = layer(x, rotary, mask, cache)
        return self.norm(x)

    def _has_step(self, x, mask, cache):
        """decoder_step takes new tokens of a cache and whole layers as they were made, and gives no gradient; on a card
        few tokens after others."""
        if self.ranks or operators() is None or mask.by_query or paddle.is_grad_enabled() or self.training:
            return False
        few = x.shape[0] * x.shape[1] <= FEW_ROWS and mask.allowed is None and (mask.by_row or mask.slots is None)
        if not x.place.is_cpu_place() and (mask.is_first or not few):
            return False
        return all(layer.has_step(x, cache) for layer in self.layers)


class Emu3ForCausalLM(CheckpointMixin, PaddleNLPGenerate, nn.Layer):
    """The Transformer with its head. PaddleNLP's `generate` works on it; `generate_images` and
    `generate_text` in generation_emu3.py are the faster way. Arguments as Emu3Model's."""

    config_class = Emu3Config
    dtypes, cpu_dtypes, repeated = Emu3Model.dtypes, Emu3Model.cpu_dtypes, Emu3Model.repeated

    def __init__(self, config, ranks=None):
        super().__init__()
        self.config, self.ranks = config, ranks
        self.model = Emu3Model(config, ranks)
        if ranks and not config.tie_word_embeddings:
            self.lm_head = SplitHead(config, ranks)
        else:
            self.lm_head = Emu3Linear(config, config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def tied_weights(self):
        return {"lm_head.weight": "model.embed_tokens.weight"} if self.config.tie_word_embeddings else {}

    @property
    def dtype(self):
        return self.model.dtype

    @property
    def weight_dtype(self):
        """Of the linear layers: "float32", "float16", "bfloat16", "int8" or "int4"."""
        return self.config.quantized_dtype or dtype_name(self.lm_head.weight.dtype)

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def gradient_checkpointing_enable(self):
        """Recompute each layer's activations in the backward pass, to train in less memory."""
        self.model.enable_recompute = True

    def gradient_checkpointing_disable(self):
        self.model.enable_recompute = False

    recompute_enable, recompute_disable = gradient_checkpointing_enable, gradient_checkpointing_disable  # PaddleNLP's

    def make_cache(self, batch_size, max_length):
        """An empty KVCache for `max_length` tokens, in this model's dtype, or bfloat16 for 16 bits on a CPU."""
        in_16_bits = self.dtype != paddle.float32
        on_cpu = self.lm_head.weight.place.is_cpu_place()
        dtype = "bfloat16" if in_16_bits and on_cpu else self.dtype
        return KVCache(self.config, batch_size, max_length, dtype, self.ranks)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        return_dict=True,
    ):
        """Logits, and the loss where labels are given.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds: as Emu3Model takes them.
            labels: int64 [batch, new]; position i is predicted from the tokens before it; -100 is left out. A batch
                without others has a loss of 0.
            past_key_values: a KVCache with the tokens before these; if it is too small, a larger copy is given back.
            use_cache: give the cache back, a new one where none is given (config.use_cache if None, but not in
                training).
            logits_to_keep: compute logits only for so many last positions; 0 for all.
            return_dict: False gives a plain tuple of what is not None.

        Returns:
            loss (float32, mean over labels that count), logits [batch, positions, vocab_size], past_key_values.
        """
        input_shape = _input_shape(input_ids, inputs_embeds)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        if labels is not None and (logits_to_keep or not is_ids(labels) or labels.shape != input_shape):
            raise InputError(
                f"labels must be int64 {list(input_shape)}, as the tokens, and take the logits of all of them, "
                f"got {kind_of(labels)}"
            )
        if past_key_values is not None:
            past_key_values = past_key_values.grown_to(past_key_values.length + input_shape[1])
        elif use_cache:
            past_key_values = self.make_cache(*input_shape)
        hidden_states = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        logits = self.lm_head(hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states)
        loss = None if labels is None else _next_token_loss(logits, labels)
        from paddlenlp.transformers.model_outputs import CausalLMOutputWithPast  # three seconds, which no command needs

        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None
        )
        return output if return_dict else output.to_tuple()


def _input_shape(input_ids, inputs_embeds):
    """[batch, new] of the one that is given."""
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError("give input_ids or inputs_embeds, one of the two")
    if inputs_embeds is None and not is_ids(input_ids):
        raise InputError(f"input_ids must be a Paddle tensor of int64 or int32, got {kind_of(input_ids)}")
    if inputs_embeds is not None and not paddle.is_tensor(inputs_embeds):
        raise InputError(f"inputs_embeds must be a Paddle tensor, got {kind_of(inputs_embeds)}")
    shape = (input_ids if inputs_embeds is None else inputs_embeds).shape
    if len(shape) != (2 if inputs_embeds is None else 3) or 0 in shape:
        raise InputError(f"input_ids must be [batch, new], inputs_embeds [batch, new, hidden_size], got {list(shape)}")
    return shape[:2]


def _next_token_loss(logits, labels):
    """Mean cross entropy of the labels that are not -100, in float32 of their rows alone."""
    labels = labels[:, 1:].flatten()
    rows = (labels != -100).nonzero().flatten()
    if not len(rows):
        return logits[:, :0].astype("float32").sum()  # 0, with a gradient of zeros: no mean of nothing
    logits = logits[:, :-1].flatten(0, 1).index_select(rows).astype("float32")
    return F.cross_entropy(logits, labels.index_select(rows))
