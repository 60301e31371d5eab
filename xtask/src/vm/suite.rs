//! What runs in guests: a part of the end-to-end suite, since a guest without KVM is ten to twenty times slower. It is
//! what depends on the kernel: every program of the kernel side, everything that is read of a process, for every
//! runtime.

use std::collections::BTreeSet;

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

/// When a test runs.
#[derive(Clone, Copy)]
enum In {
    /// Always.
    Brief,
    /// When the whole suite is asked for.
    Whole,
}

/// Tests by the name of their binary.
const TESTS: &[(&str, &[(&str, In)])] = &[
    (
        "doctor",
        &[("features_are_those_of_the_kernels_version", In::Brief)],
    ),
    (
        "probe",
        &[
            ("spawns_and_exits_are_exact", In::Brief),
            ("blocks_are_exact", In::Brief),
            (
                "what_does_not_fit_is_counted_as_dropped_and_logged",
                In::Whole,
            ),
            ("the_universal_places_count_the_same", In::Whole),
            ("another_process_of_the_same_file_is_not_counted", In::Whole),
            ("tiers_go_up_and_down", In::Whole),
            (
                "a_place_that_cannot_be_probed_is_named_and_nothing_stays",
                In::Whole,
            ),
            ("a_process_that_is_gone_is_an_error", In::Whole),
            ("a_killed_leakmon_leaves_nothing", In::Whole),
            ("every_cost_is_measured", In::Whole),
            (
                "threads::registers_of_a_blocked_thread_are_those_of_proc",
                In::Brief,
            ),
            ("threads::threads_are_exact", In::Brief),
            (
                "threads::an_id_that_is_used_again_is_another_threads",
                In::Whole,
            ),
            (
                "threads::two_plans_of_one_process_do_not_share_its_threads",
                In::Whole,
            ),
            ("threads::processes_tell_what_becomes_of_them", In::Whole),
            ("tokio::polls_are_exact", In::Brief),
            ("tokio::tasks_that_are_shut_down_end", In::Whole),
            ("tokio::places_have_arguments", In::Whole),
        ],
    ),
    ("go_versions", &[("plain", In::Brief)]),
    (
        "flow",
        &[
            ("spawns_and_exits_are_counted_exactly", In::Whole),
            ("waits_are_counted_and_timed", In::Brief),
            ("detaching_leaves_the_target_as_it_was", In::Brief),
            ("children_of_the_target_are_not_counted", In::Whole),
        ],
    ),
    (
        "leaks",
        &[("senders_are_named_within_two_intervals", In::Whole)],
    ),
    (
        "tokio",
        &[("every_task_of_the_zoo_is_found_and_no_other", In::Brief)],
    ),
    (
        "tokio_flow",
        &[
            ("spawns_and_exits_are_counted_exactly", In::Whole),
            ("detaching_leaves_the_target_as_it_was", In::Brief),
            ("a_leak_per_request_is_exact", In::Brief),
            ("the_leak_is_a_suspect_and_nothing_else_is", In::Whole),
        ],
    ),
    (
        "threads",
        &[
            ("every_wait_of_the_zoo_and_none_wrong", In::Whole),
            (
                "a_deadlock_is_named_with_both_threads_lock_and_lines",
                In::Brief,
            ),
        ],
    ),
    (
        "thread_flow",
        &[
            ("births_and_ends_are_counted_exactly", In::Whole),
            ("a_leak_has_its_line_and_number", In::Brief),
            ("waits_are_as_old_as_they_are", In::Brief),
            ("threads_without_a_known_site_are_counted", In::Whole),
        ],
    ),
    (
        "bad_input",
        &[
            ("no_such_process", In::Whole),
            ("a_kernel_thread", In::Whole),
            ("a_process_that_is_not_go", In::Whole),
            ("versions_of_go_that_nobody_knows", In::Whole),
            ("it_dies_while_it_is_watched", In::Brief),
            ("another_mount_namespace_and_another_root", In::Whole),
            ("leakmon_without_privileges", In::Whole),
            ("leakmon_without_one_capability", In::Brief),
        ],
    ),
];

/// What runs in each guest: the names of binaries and their tests.
pub(super) struct Suite(Vec<(&'static str, &'static str)>);

impl Suite {
    /// The whole suite or, in less than half the time, what shows that each runtime is counted, that what is probed is
    /// left as it was, and that what is missing is told. `only` keeps the tests with that in their name; there may be
    /// none.
    pub(super) fn new(brief: bool, only: Option<&str>) -> Suite {
        let runs = |when: In| match when {
            In::Brief => true,
            In::Whole => !brief,
        };
        let wanted = |binary: &str, test: &str| {
            only.is_none_or(|only| format!("{binary}::{test}").contains(only))
        };
        let tests = TESTS
            .iter()
            .flat_map(|(binary, tests)| tests.iter().map(|(test, when)| (*binary, *test, *when)))
            .filter(|&(binary, test, when)| runs(when) && wanted(binary, test))
            .map(|(binary, test, _)| (binary, test));
        Suite(tests.collect())
    }

    /// Binaries and their tests, in the order in which they run.
    pub(super) fn tests(&self) -> &[(&'static str, &'static str)] {
        &self.0
    }

    /// The binaries.
    pub(super) fn binaries(&self) -> BTreeSet<&'static str> {
        self.0.iter().map(|(binary, _)| *binary).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_when() {
        let count = |brief, only| Suite::new(brief, only).tests().len();
        assert_eq!((count(false, None), count(true, None)), (44, 17));
        assert_eq!(count(false, Some("probe::blocks")), 1);
    }
}
