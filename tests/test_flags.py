"""engine/flags.py. What each flag of edge_grpo.py means stands in test_edge_grpo.py, what none may be in
test_bad_input.py."""

from engine.flags import MAY_CHANGE


def test_only_what_changes_no_number_may_change_on_resume():
    assert MAY_CHANGE == set(
        "resume overwrite device out save_every keep max_bad_steps mirror max_rows "
        "micro_batch_tokens gradient_checkpointing offload_optimizer save_tokens "
        "trust_remote_code".split()
    )
