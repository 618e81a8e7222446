"""Contract 1 of the design: the sampler is exact. Random weights, fp32, CPU, small models of
several architectures."""

import copy
import math
from functools import cache, partial

import pytest
import torch
import transformers as tf
from helpers import FAMILIES, LLAMA_FAMILY, SHAPE, config_of, random_model

import rollout
from rollout import Sampler, has_llama_layers

pytestmark = pytest.mark.method
V = SHAPE["vocab_size"]
ENDS = {2, 7, 33}
PROMPTS = [
    [5, 6, 7],
    [9] * 11,
    [3],
    [8, 2, 50, 60, 70],
    [5, 6, 7],
]  # one of them stands there twice
model_of = cache(partial(random_model, noise=0.15))


def sampler_of(model, ends=ENDS, fixed=False, **options):
    """model: a name, or a model. fixed: as on a GPU, with fixed addresses, buckets of rows, rare
    looks and joined projections."""
    if isinstance(model, str):
        model = model_of(model)
    sampler = Sampler(model, ends, **options)
    sampler.fixed = fixed
    return sampler


def draw(
    sampler,
    prompts=PROMPTS,
    n=2,
    limits=20,
    temperature=1.0,
    seed=1,
    top_p=1.0,
):
    """All samples of a call, prompt by prompt."""
    return sum(sampler.sample(prompts, n, limits, temperature, seed, top_p), [])


def ids_of(samples):
    return [sample.ids for sample in samples]


def digits(text):
    return list(map(int, text))


def check_equal(samples, expected):
    assert ids_of(samples) == ids_of(expected)
    for a, b in zip(samples, expected):
        assert a.finished == b.finished
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        assert a.entropies == pytest.approx(b.entropies, abs=1e-4)


def check_numbers(model, prompts, n, samples, temperature=1.0, vocab_size=V):
    """Log-probabilities and entropies are those of one forward over prompt and response."""
    for i, sample in enumerate(samples):
        prompt = prompts[i // n]
        ids = torch.tensor([prompt + sample.ids])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1, :vocab_size]
        logp = (logits.double() / temperature).log_softmax(-1)
        entropies = -(logp.exp() * logp).sum(-1)
        logprobs = logp[range(len(sample.ids)), sample.ids]
        assert sample.logprobs == pytest.approx(logprobs.tolist(), abs=1e-4)
        assert sample.entropies == pytest.approx(entropies.tolist(), abs=1e-4)


@pytest.fixture(params=[False, True], ids=["growing", "fixed"])
def make(request):
    return partial(sampler_of, "qwen2", fixed=request.param)


# ---- Exactness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_equals_generate(name):
    model = model_of(name)
    assert has_llama_layers(model) == (name in LLAMA_FAMILY)
    samples = draw(sampler_of(name), n=1, temperature=0.0)
    for prompt, sample in zip(PROMPTS, samples):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=list(ENDS),
            pad_token_id=0,
            use_cache=name != "mamba",  # whose cache fails at one-token prompts in 5.0
        )
        assert sample.ids == expected[0, len(prompt) :].tolist()
        assert sample.logprobs == sample.entropies == [0.0] * len(sample.ids)
        assert sample.finished == (sample.ids[-1] in ENDS)


@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_equal_the_training_forward(name):
    samples = draw(sampler_of(name), n=3, temperature=0.8)
    check_numbers(model_of(name), PROMPTS, 3, samples, 0.8)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2", "gpt2", "mamba"])
def test_samples_do_not_depend_on_batch_slots_or_order(name):
    prompts = PROMPTS[:4]
    whole = ids_of(draw(sampler_of(name), prompts, 4, 12))
    assert len(set(map(tuple, whole))) > 12  # they are samples, not copies
    for rows in (1, 5):
        assert ids_of(draw(sampler_of(name, max_rows=rows), prompts, 4, 12)) == whole
    backwards = draw(sampler_of(name), prompts[::-1], 4, 12)
    for i, prompt in enumerate(prompts):
        own = whole[4 * i : 4 * i + 4]
        alone = draw(sampler_of(name), [prompt] * 4, 1, 12)
        assert ids_of(alone) == own
        assert ids_of(backwards[12 - 4 * i : 16 - 4 * i]) == own


def test_fixed_addresses_buckets_and_rare_looks_give_the_same(make):
    """With fewer slots than rows: finished rows advance no further, holes are filled, slots are
    used again."""
    expected = draw(sampler_of("qwen2"), n=4, limits=30)
    for rows in (None, 3):
        sampler = make(max_rows=rows)
        draw(sampler, n=4, limits=30, seed=5)  # the second call finds slots in use
        check_equal(draw(sampler, n=4, limits=30), expected)


def test_a_cut_row_continues_as_it_was(make):
    """A corrected row: its kept prefix is part of the prompt. The same alone, in a batch, and as
    before the cut."""
    seeds = [11, 12, 13, 14]
    whole = ids_of(draw(make(), PROMPTS[:4], 1, seed=seeds))
    prefixes, limits, rests = [], [], []
    for prompt, ids in zip(PROMPTS, whole):
        cut = min(5, len(ids) - 1)
        prefixes.append(prompt + ids[:cut])
        limits.append(20 - cut)
        rests.append(ids[cut:])
    assert ids_of(draw(make(), prefixes, 1, limits, seed=seeds)) == rests
    for i in range(4):
        [alone] = draw(make(), [prefixes[i]], 1, limits[i], seed=[seeds[i]])
        assert alone.ids == rests[i]


def test_random_streams_belong_to_seed_prompt_and_occurrence():
    sampler = sampler_of("qwen2")
    first = ids_of(draw(sampler, PROMPTS[:1], 4, seed=5))
    assert ids_of(draw(sampler, PROMPTS[:1], 4, seed=5)) == first
    assert ids_of(draw(sampler, PROMPTS[:1], 4, seed=6)) != first
    a, b, again = draw(sampler, PROMPTS[:1], 3, seed=[8, 9, 8])
    assert a.ids == again.ids != b.ids


# ---- The distribution ----------------------------------------------------------------------------


@pytest.mark.parametrize("top_p", [1.0, 0.7])
@pytest.mark.parametrize("name", ["qwen2", "gpt_neox"])
def test_frequencies_fit_the_distribution(name, top_p):
    prompt = PROMPTS[3]
    model = model_of(name)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    p = (logits / 1.5).softmax(-1)
    entropy = -(p * p.log()).sum().item()  # before the cut
    sorted_p, order = p.sort(descending=True)
    if top_p < 1:
        fewest = int((sorted_p.cumsum(0) < top_p).sum()) + 1
        p[order[fewest:]] = 0
        p /= p.sum()
    sampler = sampler_of(name, set())
    samples = draw(sampler, [prompt], 4000, 1, 1.5, top_p=top_p)
    drawn = torch.tensor([sample.ids[0] for sample in samples])
    frequency = torch.bincount(drawn, minlength=V) / 4000
    sigma = (p * (1 - p) / 4000).sqrt()
    off = (frequency - p).abs()
    assert (off <= 5 * sigma).all()
    for sample in samples[:200]:
        probability = p[sample.ids[0]].item()
        assert sample.logprobs[0] == pytest.approx(math.log(probability), abs=1e-4)
        assert sample.entropies[0] == pytest.approx(entropy, abs=1e-4)


def test_inverse_cdf_over_blocks_is_the_inverse_cdf():
    torch.manual_seed(0)
    p = torch.rand(50, 1000) ** 8
    p[:, ::3] = 0  # more than one block, some entries zero
    u = torch.rand(50, dtype=torch.float64)
    u[0], u[1] = 0.0, 1 - 2.0**-53
    ids, logprobs = rollout.invert_cdf(p, u)
    p = p.double() / p.double().sum(-1, keepdim=True)
    chosen = p[range(50), ids]
    upper = p.cumsum(-1)[range(50), ids]
    assert (chosen > 0).all()
    assert (upper > u - 1e-6).all()
    assert (upper - chosen < u + 1e-6).all()
    assert torch.allclose(logprobs, chosen.log().float(), atol=1e-5)


def test_random_numbers_are_splitmix():
    """Against plain Python integers."""

    def finalize(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    for seed, position in [
        (0, 0),
        (1, 5),
        (-3, 1000),
        (2**63 - 1, 7),
    ]:
        state = finalize(seed % 2**64) + position * 0x9E3779B97F4A7C15
        bits = finalize(state % 2**64) >> 11
        numbers = rollout.random_numbers(*torch.tensor([[seed], [position]]))
        assert numbers.item() == bits / 2**53


# ---- Ends, limits, vocabulary --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_any_end_id_ends_a_sample(name):
    samples = draw(sampler_of(name), n=30, limits=60, temperature=1.5)
    assert {sample.ids[-1] for sample in samples if sample.finished} == ENDS
    for sample in samples:
        assert not ENDS & set(sample.ids[:-1])
        assert len(sample.logprobs) == len(sample.ids)
        assert sample.finished == (sample.ids[-1] in ENDS)
        assert sample.finished or len(sample.ids) == 60


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_limits_per_row(name):
    limits = [0, 1, 7, 100, 3, 0]
    samples = draw(sampler_of(name, set()), PROMPTS[:3], 2, limits)
    long = draw(sampler_of(name, set()), PROMPTS[:3], 2, 100)
    for sample, whole, limit in zip(samples, long, limits):
        assert sample.ids == whole.ids[:limit]
        assert not sample.finished


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_padded_vocabulary_is_outside_the_distribution(name, temperature):
    def largest_id(samples):
        return max(max(sample.ids) for sample in samples)

    call = PROMPTS, 4, 20, temperature
    assert largest_id(draw(sampler_of(name, set()), *call)) >= 60
    cut = draw(sampler_of(name, set(), vocab_size=60), *call)
    assert largest_id(cut) < 60
    if temperature:
        check_numbers(model_of(name), PROMPTS, 4, cut, temperature, 60)


def test_nothing_to_do():
    sampler = sampler_of("qwen2")
    assert sampler.sample([], 8, 20, 1.0, seed=1) == []
    nothing = rollout.Sample([], [], False)
    assert sampler.sample([[1]], 2, 0, 1.0, seed=1) == [[nothing] * 2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(prompts=[[1], []]), "prompt 1 is empty"),
        (dict(prompts=[[1, V]]), "prompt 0 has an id outside 0 to 95"),
        (dict(prompts=[[-1]]), "prompt 0 has an id outside"),
        (dict(limits=[1, 2, 3]), "max_new_tokens has 3 entries for 1 prompts x 2 samples"),
        (dict(limits=-1), "must not be negative"),
        (dict(seed=[1]), "seed has 1 entries"),
        (dict(temperature=-0.1), "temperature"),
        (dict(top_p=0.0), "top_p"),
        (dict(n=0), "n must be at least 1"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(sampler_of("qwen2"), **dict(prompts=[[1]]) | arguments)


def test_an_end_id_that_cannot_be_drawn_is_named():
    with pytest.raises(ValueError, match=r"end ids \[70\]"):
        sampler_of("qwen2", {2, 70}, vocab_size=60)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(temperature):
    model = copy.deepcopy(model_of("qwen2"))
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    with pytest.raises(ValueError, match="not finite"):
        draw(sampler_of(model), temperature=temperature)


@pytest.mark.parametrize(
    "failure, error", [("nan", ValueError), ("memory", torch.OutOfMemoryError)]
)
def test_a_call_that_fails_midway_leaves_nothing_to_the_next(make, monkeypatch, failure, error):
    sampler = make(set())
    expected = draw(make(set()))
    plain = rollout.Rule.draw
    calls = []

    def fail(rule, logits, u):
        calls.append(1)
        ids, logprobs, entropies = plain(rule, logits, u)
        if len(calls) == 5:
            if failure == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            logprobs = logprobs + math.nan
        return ids, logprobs, entropies

    with monkeypatch.context() as patch:
        patch.setattr(rollout.Rule, "draw", fail)
        with pytest.raises(error):
            draw(sampler)
    assert sampler.slots is None
    assert not sampler.graphs  # the memory is free for a smaller try
    check_equal(draw(sampler), expected)


# ---- The model around it -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_a_model_in_training_samples_alike_and_is_left_as_it_was(name):
    model = copy.deepcopy(model_of(name))
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    model.gradient_checkpointing_enable()
    frozen = model.model.layers[1].eval()  # a mixture of modes, to be kept
    with torch.enable_grad():
        assert ids_of(draw(sampler_of(model))) == ids_of(draw(sampler_of(name)))
    assert model.training
    assert model.model.layers[0].training
    assert not any(module.training for module in frozen.modules())
    logits = model(torch.tensor([PROMPTS[1]])).logits
    logits.sum().backward()  # no inference tensor is left behind
    assert all(p.grad is not None for p in model.parameters())


def test_an_update_in_place_is_seen_by_the_next_call(make):
    sampler = make()
    model = sampler.model = copy.deepcopy(sampler.model)
    before = ids_of(draw(sampler))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    after = ids_of(draw(sampler))
    assert after != before
    assert after == ids_of(draw(sampler_of(model)))


def test_a_subclass_takes_its_own_forward():
    """A variant that the layers were not read for must not get the Llama family's numbers."""

    class Variant(tf.Qwen2ForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = -out.logits
            return out

    model = Variant(config_of("qwen2")).eval()
    assert not has_llama_layers(model)
    check_numbers(model, PROMPTS, 2, draw(sampler_of(model, set())))


def test_dynamic_rope_takes_its_own_forward():
    """Its angles depend on the longest row in the batch, which run_layers does not look at."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert not has_llama_layers(random_model("llama", rope_parameters=rope))


# ---- What makes it fast does happen --------------------------------------------------------------


def count_calls(monkeypatch, name):
    calls = []
    original = getattr(rollout, name)

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(rollout, name, counted)
    return calls


def test_a_prompt_is_prefilled_once(monkeypatch):
    calls = count_calls(monkeypatch, "prefill")
    draw(sampler_of("qwen2"), n=8)
    [[_, _, targets]] = calls
    assert targets.keys() == set(map(tuple, PROMPTS))
    assert sum(map(len, targets.values())) == 8 * len(PROMPTS)


@pytest.mark.parametrize(
    "limits, slots",
    [
        ("599999", ["0123"]),
        ("555599", ["0123", "01"]),  # four leave at once: nothing to copy from
    ],
)
def test_a_waiting_row_copies_a_living_prompt(monkeypatch, limits, slots):
    calls = count_calls(monkeypatch, "prefill")
    prompt = PROMPTS[1]
    sampler = sampler_of("qwen2", set(), max_rows=4)
    draw(sampler, [prompt], 6, digits(limits))
    prefilled = [targets for _, _, targets in calls if targets]
    assert prefilled == [{tuple(prompt): digits(of_call)} for of_call in slots]


def test_finished_rows_are_not_computed(monkeypatch):
    calls = count_calls(monkeypatch, "decode")
    draw(sampler_of("qwen2", set()), PROMPTS[:3], 2, digits("391629"))
    rows = [call[-1] for call in calls]
    assert rows == digits("654333222")


def test_the_longest_row_moves_into_a_hole(make, monkeypatch):
    """The host's length of a moved row decides when the cache must grow: here at the very next
    step."""
    monkeypatch.setattr(rollout, "GROWTH", 0)
    short, long = [3], [9] * 11
    _, moved = draw(make(set()), [short, long], 1, [1, 12])
    alone = draw(make(set()), [long], 1, 12)
    check_equal([moved], alone)


def test_the_cache_grows_with_the_rows_and_is_given_back(monkeypatch):
    """Through several growths, rows finishing on the way: the samples of a roomy cache."""
    sizes = []
    reserve = rollout.Slots.reserve

    def noted(self, slots, capacity):
        sizes.append((slots, capacity))
        reserve(self, slots, capacity)

    monkeypatch.setattr(rollout.Slots, "reserve", noted)
    results = []
    limits = [20, 90, 150, 240] * 5
    for growth in (1000, 8):
        monkeypatch.setattr(rollout, "GROWTH", growth)
        sampler = sampler_of("qwen2", set())
        sizes.clear()
        results.append(draw(sampler, n=4, limits=limits, temperature=1.5))
        assert sampler.slots is None
    check_equal(*results)
    assert sizes[0] == (20, 11 + 8)
    slots, capacity = sizes[-1]
    assert slots == 5
    assert 250 <= capacity < 300


def test_fixed_slots_stay_as_long_as_they_fit():
    """A graph reads weights where they lay when it was recorded."""
    model = copy.deepcopy(model_of("qwen2"))
    sampler = sampler_of(model, fixed=True)
    draw(sampler)
    slots = sampler.slots
    graphs = dict(sampler.graphs)
    keys = slots.keys[0].data_ptr()
    draw(sampler, PROMPTS[:2], limits=60)
    assert sampler.slots is slots
    assert sampler.graphs == graphs
    assert slots.keys[0].data_ptr() == keys
    draw(sampler, PROMPTS[:2], limits=60, temperature=0.0)
    assert sampler.slots is slots
    assert len(sampler.graphs) == 2
    draw(sampler, PROMPTS[:2], limits=400)  # longer
    assert sampler.slots is not slots
    assert sampler.slots.capacity >= 411
    slots = sampler.slots
    draw(sampler, n=3)  # more rows
    assert sampler.slots is not slots
    assert sampler.last_slots == 15
    slots, weight = sampler.slots, model.model.norm.weight
    weight.data = weight.data.clone()
    draw(sampler, n=3)
    assert sampler.slots is not slots


@pytest.mark.parametrize("first", ["short", "long"])
def test_many_short_rows_and_few_long_ones_take_turns_in_the_same_fixed_slots(first):
    """As sampling and reflecting do in every step of a run."""
    sampler = sampler_of("qwen2", fixed=True)
    turns = [(PROMPTS, 1, 20), (PROMPTS[:2], 1, 200)]
    if first == "long":
        turns.reverse()
    seen = []
    for turn in turns * 3:
        draw(sampler, *turn)
        seen.append(sampler.slots)
    assert all(slots is seen[1] for slots in seen[1:])
    assert len(seen[1].index) == len(PROMPTS)


def test_each_kind_of_draw_has_its_own_graphs():
    sampler = sampler_of("qwen2", set(), fixed=True)
    plain, nucleus, greedy = (1.0, 1.0), (1.0, 0.3), (0.0, 1.0)
    for temperature, top_p in (plain, nucleus, greedy, plain, nucleus):
        call = PROMPTS, 4, 12, temperature, 3, top_p
        expected = draw(sampler_of("qwen2", set()), *call)
        check_equal(draw(sampler, *call), expected)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "mamba"])
def test_max_rows_is_the_most_at_a_time_also_when_it_is_lowered(name, monkeypatch):
    sampler = sampler_of(name, set(), fixed=True)  # of no meaning to gpt2
    expected = draw(sampler, n=3, limits=8)
    sampler.max_rows = 2
    rows = []
    plain = rollout.Rule.draw

    def noted(rule, logits, u):
        alive = len(logits)
        if sampler.slots:
            alive = len(sampler.slots.rows)
        rows.append(alive)
        return plain(rule, logits, u)

    monkeypatch.setattr(rollout.Rule, "draw", noted)
    check_equal(draw(sampler, n=3, limits=8), expected)
    assert max(rows) == 2


def test_long_prompts_are_prefilled_in_parts(monkeypatch):
    """Also with a queue behind a cache that grows."""
    prompts = [list(range(i, 3 + 10 * i)) for i in range(7)]
    expected = ids_of(draw(sampler_of("qwen2"), prompts, 3, 70))
    monkeypatch.setattr(rollout, "GROWTH", 4)
    for tokens in (1, 50, 130):
        monkeypatch.setattr(rollout, "PREFILL_TOKENS", tokens)
        for rows in (None, 5, 16):
            sampler = sampler_of("qwen2", max_rows=rows)
            assert ids_of(draw(sampler, prompts, 3, 70)) == expected


# ---- Flash attention, which needs a GPU ----------------------------------------------------------


def plain_flash(
    q, k, v, starts_q, starts_k, max_q, max_k, dropout, causal, debug, *, scale, seqused_k
):
    """A plain reading of the arguments of PyTorch's flash kernel: packed rows, each's used part,
    and a causal mask that is aligned at the bottom right."""
    rows = len(seqused_k)
    assert (causal, dropout, debug) == (max_q > 1, 0.0, False)
    assert k.shape == v.shape == (rows * max_k, *k.shape[1:])
    assert starts_q.tolist() == list(range(0, len(q) + 1, max_q))
    assert starts_q.dtype == starts_k.dtype == seqused_k.dtype == torch.int32
    out = torch.empty_like(q)
    shared = q.shape[1] // k.shape[1]
    for i in range(rows):
        first, used = int(starts_k[i]), int(seqused_k[i])
        assert first + used <= int(starts_k[i + 1])
        k_i = k[first : first + used].repeat_interleave(shared, 1)  # (used, heads, D)
        v_i = v[first : first + used].repeat_interleave(shared, 1)
        own = slice(i * max_q, (i + 1) * max_q)
        weights = torch.einsum("shd,lhd->hsl", q[own], k_i) * scale
        beyond = torch.ones_like(weights).triu(used - max_q + 1)
        weights.masked_fill_(beyond.bool(), -torch.inf)
        out[own] = torch.einsum("hsl,lhd->shd", weights.softmax(-1), v_i)
    return out, None


@pytest.mark.parametrize("drafts", [0, 3])
def test_decoding_by_flash_attention_samples_the_same(make, drafts, monkeypatch):
    expected = draw(make(max_rows=7), n=3, limits=30)
    made = rollout.Slots.__init__

    def with_flash(self, *args):
        made(self, *args)
        self.flash = True

    with monkeypatch.context() as patch:
        patch.setattr(rollout.Slots, "__init__", with_flash)
        patch.setattr(torch.ops.aten, "_flash_attention_forward", plain_flash)
        sampler = make(max_rows=7, drafts=drafts)
        check_equal(draw(sampler, n=3, limits=30), expected)


@pytest.mark.parametrize(
    "device, dtype, head_dim, capability, takes",
    [
        ("cuda", torch.bfloat16, 128, 8, True),
        ("cuda", torch.float16, 256, 9, True),
        ("cuda", torch.bfloat16, 100, 8, False),
        ("cuda", torch.bfloat16, 264, 8, False),
        ("cuda", torch.float32, 128, 8, False),
        ("cpu", torch.bfloat16, 128, 8, False),
        ("cuda", torch.bfloat16, 128, 7, False),
    ],
)
def test_flash_attention_is_asked_only_where_the_kernel_can_answer(
    monkeypatch, device, dtype, head_dim, capability, takes
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    assert rollout.flash_takes(torch.device(device), dtype, head_dim) == takes


def test_flash_attention_still_takes_these_arguments():
    """The operator is private to PyTorch: its schema must keep the names and the order that
    attend_flash relies on."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    arguments = [argument.name for argument in schema.arguments]
    expected = "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal"
    assert arguments[:10] == [*expected.split(), "return_debug_mask"]
    assert {"scale", "seqused_k"} <= set(arguments)


# ---- Drafts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, temperature, top_p",
    [
        ("qwen2", 0.0, 1.0),
        ("qwen2", 1.0, 1.0),
        ("qwen3", 1.0, 1.0),
        ("qwen2", 0.8, 0.7),
    ],
)
@pytest.mark.parametrize("fixed", [False, True])
def test_drafts_change_no_sample(fixed, name, temperature, top_p, monkeypatch):
    """Ragged prompts and limits, fewer slots than rows, and texts of an earlier call in the slots.
    The number of drafts may change between calls."""
    monkeypatch.setattr(rollout, "TOKENS_PER_STEP", 10**6)
    ends = ENDS if temperature else {2}
    limits = [20, 1, 9, 40, 20] * 2
    for rows in (None, 3):
        sampler = sampler_of(name, ends, fixed, max_rows=rows)
        for k in range(9):
            call = PROMPTS, 2, limits, temperature, k // 2, top_p
            sampler.drafts = k
            expected = draw(sampler_of(name, ends), *call)
            check_equal(draw(sampler, *call), expected)
            assert not fixed or sampler.slots.drafts == k


def test_the_draft_of_the_longest_row_has_room(make):
    """Prompt and response fill a fixed cache of 128 positions."""
    call = [PROMPTS[1]], 1, 117, 0.0
    expected = draw(make(set()), *call)
    check_equal(draw(make(set(), drafts=8), *call), expected)


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("right", [True, False])
def test_a_draft_that_is_right_saves_steps_and_a_wrong_one_does_no_harm(
    make, right, k, monkeypatch
):
    """Right drafts go on behind limits and end tokens, where the row must stop nevertheless."""
    monkeypatch.setattr(rollout, "TOKENS_PER_STEP", 10**6)
    call = PROMPTS, 4, [40, 1, k, k + 1, k + 2] * 4
    expected = draw(make(), *call)
    endless = ids_of(draw(make(set()), n=4, limits=60))
    seeds = rollout.row_seeds(1, list(map(tuple, PROMPTS)), 4)
    texts = dict(zip(seeds, endless))

    def look_up(slots, rows, k):
        drafts = torch.zeros(rows, k, dtype=torch.int64)
        for i, row in enumerate(slots.rows[:rows]):
            done = int(slots.length[i]) - len(row.prompt)
            text = texts[row.seed % 2**64]
            drafts[i] = torch.tensor(text[done : done + k])
        return drafts if right else (drafts + 1) % V

    steps = count_calls(monkeypatch, "decode_drafts")
    monkeypatch.setattr(rollout, "look_up_drafts", look_up)
    sampler = make(drafts=k)
    check_equal(draw(sampler, *call), expected)
    longest = max(map(len, ids_of(expected)))
    assert longest > 2 * k
    if not sampler.fixed:
        tokens_a_step = k + 1 if right else 1
        assert len(steps) == math.ceil(longest / tokens_a_step)


@pytest.mark.parametrize(
    "drafts, texts, groups",  # the first texts are looked up in all texts
    [
        ("45", "123456123", "0"),  # its own text
        ("67", "9123 512367", "00"),  # a sibling's
        ("67", "9123 1234500 12367", "121"),  # with the same prompt
        ("89", "9123 012367012389", "00"),  # the last place
        ("67", "9123 123672389", "00"),  # three tokens before two
        ("89", "9123 542389", "00"),  # two tokens
        ("67", "23 52367", "00"),  # of a text that has no third
        ("67", "9123 12367 000123", "000"),  # nothing follows yet
        ("78 99", "123 456 1237845699", "000"),
    ],
)
def test_what_is_looked_up(drafts, texts, groups):
    """Behind each text, which must not be read, stand 77s."""
    texts, drafts = texts.split(), drafts.split()
    size = max(map(len, texts)) + 3
    slots = rollout.Slots.__new__(rollout.Slots)
    slots.ids = torch.full((len(texts), size), 77)
    for i, text in enumerate(texts):
        slots.ids[i, : len(text)] = torch.tensor(digits(text))
    slots.length = torch.tensor(list(map(len, texts)))
    slots.group = torch.tensor(digits(groups))
    slots.index = torch.arange(len(texts))
    slots.positions = torch.arange(size)
    found = rollout.look_up_drafts(slots, len(drafts), 2)
    assert found.tolist() == list(map(digits, drafts))


def test_texts_of_finished_rows_stay_for_drafts(make, monkeypatch):
    """Also when other rows move into their slots, and when these are computed with the live ones,
    because there is no graph of three rows."""
    looks = count_calls(monkeypatch, "look_up_drafts")
    prompts = [PROMPTS[1], PROMPTS[3]]
    sampler = make(set(), drafts=4)
    samples = draw(sampler, prompts, 3, [3, 40, 1, 40, 2, 40])
    slots = looks[-1][0]
    texts = []
    for slot, length in enumerate(slots.length):
        ids = slots.ids[slot, :length].tolist()
        texts.append((ids, slots.group[slot]))
    for i, sample in enumerate(samples):
        prompt = prompts[i // 3]
        assert (prompt + sample.ids, hash(tuple(prompt))) in texts


def test_texts_of_an_earlier_call_are_looked_up_too(monkeypatch):
    monkeypatch.setattr(rollout, "STEPS_PER_LOOK", 1)
    sampler = sampler_of("qwen2", set(), fixed=True, drafts=4)
    prompt = PROMPTS[3]
    texts = ids_of(draw(sampler, [prompt], 4, 30, seed=[1, 2, 3, 4]))
    in_last_slot = sampler.slots.ids[3, 5:35].tolist()
    seed = 1 + texts.index(in_last_slot)
    looks = count_calls(monkeypatch, "look_up_drafts")
    [again] = draw(sampler, [prompt], 1, 30, seed=[seed])
    assert again.ids == in_last_slot
    assert len(looks) < 12


def test_many_rows_have_no_drafts(monkeypatch):
    """A step of many rows computes as much as it reads: fewer drafts, the more rows there are."""
    monkeypatch.setattr(rollout, "TOKENS_PER_STEP", 8)
    calls = count_calls(monkeypatch, "decode_drafts")
    sampler = sampler_of("qwen2", set(), drafts=4)
    draw(sampler, PROMPTS[:1], 8, digits("11335557"))
    rows_and_drafts = {call[-2:] for call in calls}
    assert rows_and_drafts
    assert rows_and_drafts <= {(4, 1), (3, 1), (2, 3), (1, 4)}
