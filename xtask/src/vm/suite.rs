//! What runs in guests: a part of the end-to-end suite, since a guest without KVM is ten to twenty times slower. It is
//! what depends on the kernel: every program of the kernel side, everything that is read of a process, for every
//! runtime.

/// The versions of Go whose programs are there: the oldest with Go's present scheduler, and the newest.
pub(super) const GO: &[&str] = &["1.21", "1.27"];

/// The versions of tokio whose programs are there: the oldest that is read, and the newest.
pub(super) const TOKIO: &[&str] = &["1.20", "1.54"];

/// The fixtures that guests have, by their folders.
pub(super) const FIXTURES: &[&str] = &[
    "go1.21/plain",
    "go1.27/plain",
    "go1.27/pgo",
    "tokio-1.20/release",
    "tokio-1.54/release",
    "threads/c-debug",
    "threads/c-release",
    "threads/c-static-stripped",
    "threads/rust-release",
];

/// How many times as long as on this machine things may take.
pub(super) const SLOWNESS: u32 = 4;

/// Tests by the name of their binary.
pub(super) const TESTS: &[(&str, &[&str])] = &[
    ("doctor", &["features_are_those_of_the_kernels_version"]),
    (
        "probe",
        &[
            "spawns_and_exits_are_exact",
            "blocks_are_exact",
            "what_does_not_fit_is_counted_as_dropped_and_logged",
            "the_universal_places_count_the_same",
            "another_process_of_the_same_file_is_not_counted",
            "tiers_go_up_and_down",
            "a_place_that_cannot_be_probed_is_named_and_nothing_stays",
            "a_process_that_is_gone_is_an_error",
            "a_killed_leakmon_leaves_nothing",
            "every_cost_is_measured",
            "threads::registers_of_a_blocked_thread_are_those_of_proc",
            "threads::threads_are_exact",
            "threads::an_id_that_is_used_again_is_another_threads",
            "threads::two_plans_of_one_process_do_not_share_its_threads",
            "threads::processes_tell_what_becomes_of_them",
            "tokio::polls_are_exact",
            "tokio::tasks_that_are_shut_down_end",
            "tokio::places_have_arguments",
        ],
    ),
    ("go_versions", &["plain"]),
    (
        "flow",
        &[
            "spawns_and_exits_are_counted_exactly",
            "waits_are_counted_and_timed",
            "detaching_leaves_the_target_as_it_was",
            "children_of_the_target_are_not_counted",
        ],
    ),
    ("leaks", &["senders_are_named_within_two_intervals"]),
    ("tokio", &["every_task_of_the_zoo_is_found_and_no_other"]),
    (
        "tokio_flow",
        &[
            "spawns_and_exits_are_counted_exactly",
            "detaching_leaves_the_target_as_it_was",
            "a_leak_per_request_is_exact",
            "the_leak_is_a_suspect_and_nothing_else_is",
        ],
    ),
    (
        "threads",
        &[
            "every_wait_of_the_zoo_and_none_wrong",
            "a_deadlock_is_named_with_both_threads_lock_and_lines",
        ],
    ),
    (
        "thread_flow",
        &[
            "births_and_ends_are_counted_exactly",
            "a_leak_has_its_line_and_number",
            "waits_are_as_old_as_they_are",
            "threads_without_a_known_site_are_counted",
        ],
    ),
    (
        "bad_input",
        &[
            "no_such_process",
            "a_kernel_thread",
            "a_process_that_is_not_go",
            "versions_of_go_that_nobody_knows",
            "it_dies_while_it_is_watched",
            "another_mount_namespace_and_another_root",
            "leakmon_without_privileges",
            "leakmon_without_one_capability",
        ],
    ),
];

/// How many tests a guest runs.
pub(super) fn count() -> usize {
    TESTS.iter().map(|(_, tests)| tests.len()).sum()
}
