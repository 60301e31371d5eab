//! What `leakmon doctor` says of this kernel is so.

mod common;

/// The major and minor number that a version begins with.
fn version(text: &str) -> (u32, u32) {
    let mut numbers = text
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|number| number.parse().ok());
    let (major, minor) = (numbers.next(), numbers.next());
    (major.expect("a version"), minor.expect("a version"))
}

/// Every feature of the kernel is found from the version on that has it, and not
/// before; and every tier is possible, whatever is missing.
#[test]
fn features_are_those_of_the_kernels_version() {
    let doctor = common::run(&mut common::leakmon(["doctor"]));
    doctor.expect_code(0);
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a release");
    let (_, table) = doctor
        .out
        .split_once("What this kernel has, tried:\n")
        .expect("a table");
    let mut features = 0;
    for line in table.lines().filter(|line| !line.starts_with(' ')) {
        eprintln!("{line}");
        let (there, since) = match line.split_once(" yes (") {
            Some((_, since)) => (true, since),
            None => (false, line.split_once(" no (").expect("yes or no").1),
        };
        assert_eq!(there, version(&release) >= version(since), "{line}");
        features += 1;
    }
    assert_eq!(features, 9, "{table}");
}
