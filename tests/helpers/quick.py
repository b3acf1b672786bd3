"""What the default run leaves to the slow one, because it shows the same again."""

import collections

import pytest


def some(names, *quick):
    """Returns all names, those but the quick ones marked as slow."""
    assert set(quick) <= set(names), "a quick one has another name"
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


# Functions with so many of their cases in the default run; the others take long
SPREAD = {
    "test_100_000_steps_of_noise_cost_no_skip_and_no_revert": 1,
    "test_a_constant_added_to_the_loss_changes_nothing_at_all": 1,
    "test_a_failed_start_leaves_nothing_in_the_moments": 2,
    "test_a_group_without_anything_finite_is_one_skipped_step": 1,
    "test_a_leaf_adds_to_a_large_program_what_it_adds_to_a_small_one": 0,
    "test_a_micro_batch_that_is_not_finite_is_dropped_alone": 6,
    "test_a_moment_that_no_gradient_can_have_made_starts_anew": 1,
    "test_a_new_head_stays_where_it_is_told": 1,
    "test_a_new_level_is_accepted_in_time": 2,
    "test_a_norm_outlier_never_reverts_where_the_loss_is_ordinary": 1,
    "test_a_population_has_a_rate_each": 0,
    "test_a_population_is_recorded_member_by_member": 0,
    "test_a_rare_domain_of_hard_data_is_hardly_ever_rejected": 2,
    "test_a_rate_a_thousand_times_too_high_is_survived": 1,
    "test_a_rate_a_thousand_times_too_low_is_found": 1,
    "test_a_restart_sets_a_sum_of_squares_back_to_where_it_began": 1,
    "test_a_resumed_run_is_the_one_that_went_on_bit_for_bit": 1,
    "test_a_run_for_each_device_begins_inside_of_shard_map": 0,
    "test_a_run_resumes_inside_of_a_group": 1,
    "test_a_sharded_run_with_a_nan_goes_on_and_stays_sharded": 1,
    "test_a_verdict_from_outside_is_ignored": 1,
    "test_a_whole_optimizer_finds_its_rate_downhill": 1,
    "test_accumulation_needs_one_accumulator_and_no_copies": 1,
    "test_adamw_goes_on_as_lalerg_with_the_same_steps_and_back": 1,
    "test_all_numeric_hyperparams_can_be_injected_at_once": 2,
    "test_anchor_in_host_memory_is_that_on_the_device_step_by_step": 0,
    "test_another_loss_is_no_harm": 1,
    "test_any_size_of_gradient_and_params_is_told_in_finite_numbers": 6,
    "test_as_micro_of_lalerg_it_is_the_one_that_lalerg_has": 1,
    "test_bad_batches_early_on_do_not_end_the_search": 1,
    "test_bad_numbers_cost_their_own_steps_and_nothing_else": 3,
    "test_bad_numbers_from_the_very_first_step_on": 3,
    "test_bloom_spike_is_held_off_by_its_norms_and_undone_as_the_loss_jumps": 1,
    "test_chained_with_anything_the_loss_falls": 3,
    "test_complex_params_converge": 1,
    "test_counters_add_up": 1,
    "test_counters_stay_at_the_largest_int32": 2,
    "test_damaged_params_go_back_to_the_anchor": 4,
    "test_data_that_are_often_not_finite_do_not_speak_against_the_params": 2,
    "test_devices_drop_the_same_micro_batches": 1,
    "test_devices_with_losses_of_their_own_decide_alike": 0,
    "test_devices_with_parameters_of_their_own_decide_alike": 0,
    "test_donated_shards_keep_their_shardings_and_decide_like_one_device": 0,
    "test_each_leaf_is_told_as_the_docstring_says": 1,
    "test_eight_devices_take_the_run_of_one": 1,
    "test_error_regulate_follows_an_optimizer_and_keeps_nan_out_of_it": 2,
    "test_error_regulate_follows_lbfgs_with_its_line_search": 1,
    "test_every_fault_costs_less_than_5_percent_of_the_drop": 1,
    "test_every_kind_of_real_number_is_a_value": 1,
    "test_every_step_is_that_of_the_reference": 4,
    "test_explicit_axes_keep_the_shardings_of_a_state": 0,
    "test_first_steps_that_are_not_finite_are_no_harm": 4,
    "test_groups_with_one_rate_are_multiplied_by_that_of_all": 1,
    "test_hyperparameter_at_the_edge_of_its_range_works": 40,
    "test_lalerg_without_search_follows_adamw": 1,
    "test_made_up_audits_in_every_state_move_the_rate_as_in_the_reference": 4,
    "test_many_reverts_do_not_freeze_the_run": 1,
    "test_means_of_micro_batches_are_sharded_like_the_params": 0,
    "test_metrics_tell_whether_a_micro_batch_completed_a_step": 2,
    "test_micro_batches_take_the_steps_of_whole_batches": 2,
    "test_nan_at_the_first_step_keeps_no_optimizer_from_training": 2,
    "test_nnx_optimizer_trains_as_it_is": 1,
    "test_no_buffer_is_in_a_state_twice": 2,
    "test_noise_of_an_odd_shape_costs_no_skip_and_hardly_a_revert": 1,
    "test_none_leaves_stay_none_and_the_others_converge": 1,
    "test_one_trace_for_a_whole_run": 2,
    "test_outside_of_jit_the_results_are_the_same": 0,
    "test_params_that_are_lost_are_gone_back_for_all_the_same": 1,
    "test_params_updates_and_state_stay_finite": 1,
    "test_protection_costs_nothing_where_nothing_is_wrong": 0,
    "test_protection_needs_no_temporaries_and_no_copies": 2,
    "test_rates_and_errors_stay_in_their_bounds": 2,
    "test_runs_side_by_side_decide_like_each_alone": 0,
    "test_scalar_params_converge": 1,
    "test_search_finds_its_rate_with_a_narrow_anchor_too": 0,
    "test_sharded_leaves_are_told_as_on_one_device": 0,
    "test_state_and_updates_are_sharded_like_the_params_from_step_to_step": 0,
    "test_state_and_updates_keep_their_types": 3,
    "test_step_by_step_without_jit_the_verdicts_are_the_same": 0,
    "test_the_norm_is_that_of_all_entries_in_float32": 6,
    "test_they_are_those_before_a_step_that_was_healthy": 1,
    "test_train_state_trains_a_model_with_batch_norm_and_dropout": 1,
    "test_training_without_a_fault_is_left_alone": 1,
    "test_under_shard_map_all_devices_tell_the_view_of_the_mean_gradient": 0,
    "test_under_vmap_each_run_drops_and_steps_for_itself": 0,
    "test_units_and_level_of_the_loss_change_nothing": 2,
    "test_unknown_extra_args_are_ignored": 1,
    "test_updates_have_the_dtypes_of_params": 24,
    "test_updates_of_any_tree_go_downhill": 2,
    "test_whatever_is_written_points_uphill_as_second_level": 5,
    "test_with_faults_it_lives_and_ends_nearly_as_low": 5,
    "test_with_nothing_wrong_it_ends_no_worse_than_bare": 2,
    "test_with_plain_optax_the_second_step_of_a_revert_is_exact": 1,
    "test_with_the_right_arguments_it_is_the_rule_of_optax": 10,
}
# likewise, of the tests that Optax ships
OF_OPTAX = {
    "test_optimizers": 1,
    "test_preserve_dtype": 1,
    "test_state_shape_dtype_shard_stability": 1,
}
SLOW_PAGES = ("accumulate", "checkpoint", "clients", "faq", "monitoring", "reverting")


def mark_the_rest(items):
    """Marks as slow what shows the same again, and takes long.

    What stays of a function lies as far apart as possible in its list of cases.
    """
    cases = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("slow") is None:
            name = getattr(item, "originalname", item.name)
            cases[name.rstrip("0123456789")].append(item)  # Optax numbers its cases
    for name, own in cases.items():
        number = min((SPREAD | OF_OPTAX).get(name, len(own)), len(own))
        step = (len(own) - 1) / max(number - 1, 1)
        kept = {round(i * step) for i in range(number)}
        for i, item in enumerate(own):
            is_page = item.name.endswith(tuple(f"says[{p}]" for p in SLOW_PAGES))
            if i not in kept or is_page:
                item.add_marker(pytest.mark.slow)
