"""Sample, grade and measure entropies with this project's parts, from a script of your own.

pip install -e . && python examples/sample_and_grade.py --model tiny
"""

import argparse

import engine
import reward
from engine.forward import response_logprobs

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="tiny", help="a model folder, a hub id, or `tiny`")
parser.add_argument("--question", default="Mia has 30 cards. (1) sells 18. (2) buys 20. How many?")
parser.add_argument("--gold", default="32")
args = parser.parse_args()

policy = engine.load_policy(args.model)
prompt = policy.prompt_ids(args.question)
[samples] = policy.sampler.sample([prompt], n=4, max_new_tokens=256, temperature=0.6, seed=0)
responses = [sample.ids for sample in samples]
scores = reward.score_all([policy.decode(ids) for ids in responses], [args.gold] * 4)
known = response_logprobs(
    policy.model, [prompt] * 4, responses, 0.6, policy.vocab_size, budget=8192
)
for ids, (form, accuracy), (logp, entropy) in zip(responses, scores, known):
    print(f"right {accuracy:.0f}, boxed {form:.0f}, log-probability {logp.sum():.2f}, ", end="")
    print(f"entropy {entropy.mean():.3f} nats a token: {policy.decode(ids)!r}")
