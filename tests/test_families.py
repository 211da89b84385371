"""Which families of causal language models this program trains: all that transformers has.

A tiny random model of every type is saved as a user would have it on disk, and loaded by
load.load_model. A SUPPORTED one is sampled from, read again in other ways that must agree, and
trained for one update; a REFUSED one ends in one line that says why. A type with a slash is a
second form of a family.
"""

import copy
import importlib.metadata
import math
import re

import pytest
import torch
import worlds
from torch.nn.functional import pad
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers import AutoModelForImageTextToText as AutoModelForImages
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

import data
import policies
import ppo_core
from support import fast, load, preflight

pytestmark = pytest.mark.slow  # half a minute for all

# ---------------------------------------------------------------------------------- configurations

# What most families call their sizes; one that a family does not know does no harm, and one that
# it must not be given is None in its own changes. The weights are wide, so that a wrong scale, cap
# or position shows in the logits.
TINY = dict(
    vocab_size=336, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    initializer_range=0.3, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    # mixtures of experts
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=16, moe_topk=2, moe_k=2, n_group=1, topk_group=1)

WINDOW = dict(sliding_window=4)  # shorter than the texts here
QWEN_WINDOW = dict(WINDOW, use_sliding_window=True, max_window_layers=1)
# Latent attention; the indexed kind looks at the index_topk positions of the best scores, which
# are a sum over heads of what is often 0: with few heads two scores would be equal, and the choice
# between them depend on the padding.
LATENT = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
              num_key_value_heads=4, head_dim=4)
INDEXED = dict(LATENT, index_topk=4, index_head_dim=8, index_n_heads=16)
# Layers with a state in place of keys and values, beside one with attention, as all of these have.
LINEAR = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
              linear_num_value_heads=4, layer_types=["linear_attention", "full_attention"],
              shared_expert_intermediate_size=16)
KIMI = dict(LATENT, linear_head_dim=8, linear_num_heads=4, num_experts_per_token=2,
            num_expert_group=1, layer_types=LINEAR["layer_types"])
CONV = dict(layer_types=["conv", "full_attention"], num_dense_layers=1)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1,
             mamba_chunk_size=8)
# Two families bound a time step from below in the whole text, and not where they go by the cache.
NO_FLOOR = dict(time_step_min=1e-6)
GEMMA_3N = dict(
    num_kv_shared_layers=0, vocab_size_per_layer_input=336, hidden_size_per_layer_input=8,
    laurel_rank=4, activation_sparsity_pattern=[0.95, 0.0],
    pad_token_id=None)  # an embedding of zeros, as a new one's is of the pad, has a gradient of NaN
GEMMA_4 = dict(WINDOW, vocab_size_per_layer_input=336, hidden_size_per_layer_input=8)
QWEN_4 = dict(LINEAR, layer_types=["linear_attention", "indexed_attention"], indexer_n_heads=2,
              indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=4, indexer_compress_ratio=2,
              ngram_vocab_size_base=100, hc_lowrank=8, ple_embed_dim=32, split_ngram_parts=1,
              heads_per_ngram=2)
ROPE = dict(rope_type="default", rope_theta=1e4)
IMAGES = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
              image_size=28, patch_size=14)
QWEN_IMAGES = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)


def whole(text: dict, **changes) -> dict:
    """The changes of a family with a text model inside, whose sizes are the text model's."""
    return dict(changes, text_config=TINY | text)


def each(types: str, changes: dict | None = None) -> dict:
    return dict.fromkeys(types.split(), changes or {})


SUPPORTED = {
    **each("apertus arcee aria_text biogpt bitnet bloom cohere ctrl diffllama ernie4_5 "
           "ernie4_5_moe flex_olmo gemma glm glm4 glm4_moe gpt-sw3 gpt2 gpt_bigcode gpt_neox "
           "gpt_neox_japanese granite granitemoe granitemoeshared helium hrm_text "
           "hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe "
           "llama minimax_m2 moshi mpt nanochat nemotron olmo olmo2 olmo_hybrid olmoe opt "
           "persimmon phi seed_oss solar_open stablelm xglm"),
    **each("afmoe beam cohere2 cohere2_moe cwm deepseek_v4 doge exaone4 exaone_moe flint gemma2 "
           "gemma3_text gemma4_unified_text gpt_oss granite_swa granitemoe_swa inkling2_text "
           "inkling_text kolibri1 laguna mellum mimo_v2_flash minimax minimax_m3_vl_text "
           "ministral ministral3 mistral mixtral modernbert-decoder olmo3 phi3 phimoe starcoder2 "
           "vaultgemma", WINDOW),
    **each("qwen2 qwen2_moe qwen3 qwen3_moe smollm3", QWEN_WINDOW),
    **each("axk1 deepseek_v2 glm4_moe_lite minicpm3 youtu", LATENT),
    **each("axk2 dots3_note_text glm_moe_dsa hy_v4", INDEXED),
    **each("qwen3_5_text qwen3_5_moe_text qwen3_next", LINEAR),
    **each("bert/decoder bert-generation/decoder big_bird/decoder electra/decoder ernie/decoder "
           "megatron-bert/decoder rembert/decoder roformer/decoder", dict(is_decoder=True)),
    "bailing_hybrid": dict(KIMI, first_k_dense_replace=1),
    "bamba": dict(MAMBA, attn_layer_indices=[1]),
    "codegen": dict(rotary_dim=4),
    "cohere_compass_text": dict(WINDOW, rope_parameters=dict.fromkeys(
        ("full_attention", "sliding_attention"), ROPE)),
    "dbrx": dict(d_model=32, attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
                 ffn_config=dict(ffn_hidden_size=16, hidden_size=32, moe_num_experts=2)),
    "deepseek_v3": dict(LATENT, first_k_dense_replace=1),
    "deepseek_v32": dict(INDEXED, first_k_dense_replace=1),
    "dots1": dict(WINDOW, n_shared_experts=1),
    "emu3": whole({}),
    "falcon": dict(head_dim=None),
    "falcon/40b": dict(head_dim=None, new_decoder_architecture=True, num_kv_heads=2),
    "falcon/rw": dict(head_dim=None, alibi=True, multi_query=False, parallel_attn=False),
    "falcon_h1": dict(MAMBA, mamba_d_ssm=64),
    "fuyu": whole({}, image_size=30, patch_size=10),
    "gemma3": whole(WINDOW, vision_config=IMAGES, mm_tokens_per_image=4),
    "gemma3n_text": GEMMA_3N,
    "gemma4": whole(GEMMA_4),
    "gemma4_text": GEMMA_4,
    "gemma4_unified": whole(WINDOW),
    "got_ocr2": whole({}, vision_config=dict(
        hidden_size=16, output_channels=8, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, mlp_dim=16, global_attn_indexes=[0])),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=4),
    "gptj": dict(rotary_dim=4),
    "granitemoehybrid": dict(MAMBA, layer_types=["mamba", "attention"],
                             shared_intermediate_size=32),
    "granite/scaled": dict(logits_scaling=0.5, residual_multiplier=0.5, embedding_multiplier=2.0),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4,
                  use_mamba_kernels=False),
    "kimi_linear": KIMI,
    "lfm2": CONV,
    "lfm2_moe": CONV,
    "lfm3": dict(CONV, **WINDOW),
    "llama4": whole(dict(intermediate_size_mlp=64, attention_chunk_size=8), vision_config=dict(
        IMAGES, intermediate_size=64, vision_output_dim=16, projector_input_dim=16,
        projector_output_dim=16)),
    "llama4_text": dict(intermediate_size_mlp=64, attention_chunk_size=8),
    "longcat_flash": dict(LATENT, num_layers=1, ffn_hidden_size=64, expert_ffn_hidden_size=16,
                          zero_expert_num=2),
    "mllama": whole(dict(cross_attention_layers=[1]), vision_config=IMAGES),
    "moss_transcribe_diarize": whole({}, audio_config=dict(
        num_mel_bins=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        hidden_size=16)),
    "nemotron_h": dict(
        NO_FLOOR, layers_block_type=["linear_attention", "full_attention", "mlp", "moe"],
        num_hidden_layers=4, ssm_state_size=8, mamba_num_heads=4, mamba_head_dim=16, n_groups=1,
        chunk_size=8, moe_shared_expert_intermediate_size=16),
    "opt/350m": dict(word_embed_proj_dim=16, do_layer_norm_before=False),
    "phi4_multimodal": dict(vision_config=dict(IMAGES, crop_size=28), audio_config=dict(
        hidden_size=16, intermediate_size=16, num_blocks=1, num_attention_heads=2,
        ext_pw_out_channel=16, depthwise_separable_out_channel=16, nemo_conv_channels=16,
        input_size=16)),
    "qwen3_5": whole(LINEAR, vision_config=QWEN_IMAGES),
    "qwen3_5_moe": whole(LINEAR, vision_config=QWEN_IMAGES),
    "qwen4_exp": whole(QWEN_4, vision_config=QWEN_IMAGES),
    "qwen4_exp_text": QWEN_4,
    "roc_bert/decoder": dict(is_decoder=True, pronunciation_embed_dim=8, shape_embed_dim=8,
                             shape_vocab_size=50, pronunciation_vocab_size=50),
    "zamba": dict(num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid"] * 2,
                  attention_hidden_size=64, attention_head_dim=16, num_key_value_heads=4,
                  mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False),
    "zamba2": dict(NO_FLOOR, layers_block_type=["linear_attention", "hybrid"], mamba_d_state=8,
                   mamba_headdim=16, n_mamba_heads=4, mamba_ngroups=1, chunk_size=8,
                   num_mem_blocks=1, num_key_value_heads=4, adapter_rank=4),
    "zaya": dict(WINDOW, num_experts_per_tok=1),
}

# {type: (config changes, a word of the reason)}
REFUSED = {
    **each("bart bigbird_pegasus blenderbot blenderbot-small marian mbart musicgen musicgen_melody "
           "mvp pegasus plbart t5 whisper", ({}, "encoder-decoder")),
    "prophetnet": (dict(num_hidden_layers=None), "encoder-decoder"),
    **each("bert bert-generation big_bird camembert cpmant data2vec-text electra ernie "
           "megatron-bert rembert roberta roberta-prelayernorm roformer xlm xlm-roberta "
           "xlm-roberta-xl", ({}, "see later ones")),
    # Their first position is 2 or so, unless one tells them otherwise, as ppo_core does.
    **each("camembert/decoder data2vec-text/decoder roberta/decoder roberta-prelayernorm/decoder "
           "xlm-roberta/decoder xlm-roberta-xl/decoder", (dict(is_decoder=True), "position")),
    **each("falcon_mamba mamba", (dict(state_size=4), "no key/value cache")),
    **each("openai-gpt rwkv", ({}, "no key/value cache")),
    "blt": (dict(
        encoder_hash_byte_group_vocab=50, encoder_hash_byte_group_size=[3], cross_attn_k=1,
        patcher_config=TINY, **dict.fromkeys(
            ("encoder_config", "decoder_config", "global_config"),
            TINY | dict(hidden_size_global=32, num_key_value_heads=4, cross_attn_k=1))),
        "padding on the left"),
    "clip": ({}, "Unrecognized configuration"),
    "git": (dict(vision_config=IMAGES), "cache gives other logits"),
    "mamba2": (dict(num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=8),
               "no key/value cache"),
    "recurrent_gemma": (dict(block_types=["recurrent", "attention"], lru_width=32,
                             attention_window_size=4), "no key/value cache"),
    "reformer": (dict(
        is_decoder=True, attn_layers=["local", "local"], axial_pos_shape=[8, 8],
        axial_pos_embds_dim=[16, 16], attention_head_size=8), "no key/value cache"),
    "roc_bert": (SUPPORTED["roc_bert/decoder"] | dict(is_decoder=False), "see later ones"),
    "trocr": ({}, "padding on the left"),
    "xlnet": (dict(max_position_embeddings=None, d_head=8), "see later ones"),
    "xlstm": (dict(hidden_size=64, embedding_dim=64, num_blocks=2, qk_dim_factor=1.0),
              "no key/value cache"),
    "xmod": (dict(default_language="en_XX"), "see later ones"),
}

UNTRIED = {
    "dots3_note": "its three parts must fit; its text part is dots3_note_text",
    "gemma3n": "it needs the package timm; its text part is gemma3n_text",
    "gemma4_assistant": "a drafter, which reads another model's keys and values",
    "gemma4_unified_assistant": "a drafter, which reads another model's keys and values",
}

# Under autocast their own forward mixes types.
FLOAT32_ONLY = {"dbrx"}
# Their layers are in no list of their own, or read more than the one before them makes.
UNDIVIDED = {"gemma3n_text", "gemma4", "gemma4_text", "hrm_text", "longcat_flash", "mllama",
             "nemotron_h", "zamba"}


def saved(folder, kind: str, changes: dict) -> str:
    """A folder with a random model of this type, its tokenizer and the config of the whole."""
    needed = CAUSAL if kind in SUPPORTED else CONFIG_MAPPING
    kind, _, _ = kind.partition("/")
    if kind not in needed:
        pytest.skip(f"this version of transformers has no such model of type {kind!r}")
    sizes = changes if "text_config" in changes else TINY | changes
    sizes = {name: value for name, value in sizes.items() if value is not None}
    make = AutoModelForImages if "vision_config" in changes else AutoModelForCausalLM
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **copy.deepcopy(sizes))
    if type(config) not in make._model_mapping:
        make = AutoModelForCausalLM  # Phi 4 has images and one class for all
    if type(config) in make._model_mapping and not config.is_encoder_decoder:
        make.from_config(config).save_pretrained(folder)
    # A model of text alone would save the config of its own part, and a published one has it all.
    AutoConfig.for_model(kind, **copy.deepcopy(sizes)).save_pretrained(folder)
    worlds.save_tokenizer(folder)
    return str(folder)


# ------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("kind", SUPPORTED)
def test_a_family_is_trained(tmp_path, small_settings, kind):
    folder = saved(tmp_path, kind, SUPPORTED[kind])
    model, tokenizer, forbidden = load.load_model(folder, "cpu", [].append)
    settings = small_settings(batch=4, response_length=5, micro_batch=2, epochs=1, minibatches=2)
    ends, pad_id = load.eos_ids(tokenizer, model), tokenizer.pad_token_id
    stream = torch.Generator().manual_seed(0)
    short = copy.deepcopy(model)  # the model itself keeps transformers' own choice of attention
    fast.eager_if_short(short, 32, torch.float32)
    initial, policy = (fast.policy(copy.deepcopy(short), forbidden, torch.float32)
                       for _ in range(2))
    torch.nn.init.normal_(policy.value_head.weight)  # else all values are 0, read right or wrong
    reward = fast.reward_model(short, "last", stream)
    prompts = data.pad(data.encode_prompts(tokenizer, [
        "The room was", "The lovely song and golden film", "The", "The soup was calm"]),
        pad_id, "left")

    def collect(policy: ppo_core.Policy) -> ppo_core.Rollout:
        return ppo_core.collect(
            policy, [initial], torch.ones(1), initial, data.model_scorer(reward, ends), *prompts,
            settings, eos_id=ends, pad_id=pad_id, generator=stream)

    rollout = collect(policy)  # samples by ppo_core.generate
    valid = rollout.mask.bool()

    def agree(one: torch.Tensor, other: torch.Tensor, what: str) -> None:
        assert torch.isfinite(one).all() and torch.isfinite(other).all(), what
        assert (one - other).abs().max() < 1e-3, what

    with torch.no_grad():
        # 1. The sampler's cache, and more left padding, give the training forward's numbers.
        cached = preflight.cached_logprobs(policy, rollout, settings.temperature)
        agree(cached[valid], rollout.logprobs[valid], "cached sampling")
        ids, attention = pad(rollout.ids, (3, 0), value=pad_id), pad(rollout.attention, (3, 0))
        logprobs, _, values = ppo_core.score_tokens(
            policy, ids, attention, rollout.response, rollout.mask, settings.temperature)
        agree(logprobs[valid], rollout.logprobs[valid], "left padding, log-probs")
        agree(values[valid], rollout.values[valid], "left padding, values")
        scores = reward(rollout.ids, rollout.attention)
        agree(reward(ids, attention), scores, "left padding, scores")

        # 2. A row alone, by the model's own plain forward, gives them too.
        spread = 0.0
        for row, mask in enumerate(valid):
            text = rollout.ids[row][rollout.attention[row].bool()][None]
            logits = model(input_ids=text).logits[0].float().masked_fill(forbidden, -torch.inf)
            plain = (logits / settings.temperature).log_softmax(-1)[:-1]
            plain = plain.gather(-1, text[0, 1:, None])[-int(mask.sum()):, 0]
            agree(plain, rollout.logprobs[row][mask], "plain forward")
            spread = max(spread, logits[:, ~forbidden].std().item())
            right = pad(text, (0, 3), value=pad_id)
            score = reward(right, pad(torch.ones_like(text), (0, 3)))
            agree(score, scores[row], "right padding, scores")
        assert spread > 0.05  # else all of these agree for any model

    # 3. An update of the policy, and one of the reward model.
    before = [weight.clone() for weight in policy.model.parameters()]
    metrics = ppo_core.optimise(
        policy, torch.optim.Adam(policy.parameters(), lr=1e-3), rollout, torch.ones(1), 0.1,
        settings, stream)
    assert all(map(math.isfinite, metrics.values())) and metrics["grad_norm"] > 0
    moved = [not torch.equal(*pair)
             for pair in zip(before, policy.model.parameters(), strict=True)]
    assert any(moved) and all(torch.isfinite(weight).all() for weight in policy.parameters())
    pair = tuple(rollout.ids[row][rollout.attention[row].bool()].tolist() for row in (0, 1))
    loss = data.fit_reward_model(reward, [pair], pad_id, lr=1e-3, epochs=2, generator=stream)
    assert math.isfinite(loss)

    # 4. The last layer alone learns: the other is the initial model's own, and is read once.
    if kind in UNDIVIDED:
        with pytest.raises(data.UserError, match="cannot be divided"):
            load.check_layers(model, kind, 1, 1)
    else:
        load.check_layers(model, kind, 1, 1)
        initial, last = (fast.policy(one, forbidden, torch.float32, 1)
                         for one in (model, policies.twin(model, 1)))
        with torch.no_grad():
            for weight in filter(torch.is_floating_point, last.weights().values()):
                weight += 0.1 * torch.randn(weight.shape, generator=stream)
            text = rollout.ids, rollout.attention, rollout.prompt_length
            apart = [one.response_forward(*text)[0] for one in (last, initial)]
            with policies.read_once(last.still_layers):
                once = [one.response_forward(*text)[0] for one in (last, initial)]
        for one, other in zip(apart, once, strict=True):
            agree(one[valid][:, ~forbidden], other[valid][:, ~forbidden], "read once")
        assert (apart[0] - apart[1])[valid][:, ~forbidden].abs().max() > 1e-3
        probe = fast.reward_model(model, "mean", stream, 1)
        assert data.fit_reward_model(probe, [pair], pad_id, lr=1e-1, epochs=9, generator=stream) < 1

    # 5. The same in bfloat16: sampled, and read.
    if kind not in FLOAT32_ONLY:
        half = collect(fast.policy(model, forbidden, torch.bfloat16))
        assert torch.isfinite(half.logprobs[half.mask.bool()]).all()


@pytest.mark.parametrize("kind", REFUSED)
def test_a_family_is_refused(tmp_path, kind):
    changes, word = REFUSED[kind]
    folder = saved(tmp_path, kind, changes)
    with pytest.raises(data.UserError, match=re.escape(word)) as error:
        load.load_model(folder, "cpu", [].append)
    assert "\n" not in str(error.value)


def test_every_family_of_transformers_is_in_one_table():
    requirements = (load.HOME / "requirements.txt").read_text(encoding="utf-8")
    pinned = re.search(r"^transformers==(.+)$", requirements, re.MULTILINE)[1]
    if (installed := importlib.metadata.version("transformers")) != pinned:
        pytest.skip(f"the tables are those of transformers {pinned}, and {installed} is installed")
    tables = [{kind for kind in table if kind in CAUSAL} for table in (SUPPORTED, REFUSED, UNTRIED)]
    assert set().union(*tables) == set(CAUSAL)
    assert sum(map(len, tables)) == len(CAUSAL)
    readme = (load.HOME / "README.md").read_text(encoding="utf-8")
    version = ".".join(pinned.split(".")[:2])
    assert f"all {len(CAUSAL)} types that transformers {version} has" in readme
    assert f"{len(tables[0])} train" in readme and f"{len(tables[1])} are refused" in readme
