//! Which processes are watched, and how closely.

use std::fmt;
use std::time::Duration;

use globset::GlobMatcher;
use serde::{Deserialize, Deserializer};

use crate::config::duration;
use crate::process::discovery;
use crate::task::Tier;

/// How closely a process is watched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Depth {
    /// It is not.
    Off,
    /// Censuses alone.
    #[default]
    Census,
    /// Spawns and exits, too, within the budget.
    Lifecycle,
    /// And every wait.
    Blocking,
}

impl Depth {
    /// The tier, of what is watched.
    pub fn tier(self) -> Option<Tier> {
        match self {
            Depth::Off => None,
            Depth::Census => Some(Tier::Census),
            Depth::Lifecycle => Some(Tier::Lifecycle),
            Depth::Blocking => Some(Tier::Blocking),
        }
    }
}

impl fmt::Display for Depth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.tier().map_or("off", Tier::name))
    }
}

/// Who is meant, and how closely they are watched. Each condition that is given
/// must hold.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rule {
    /// Of the executable's path, its file name, or the kernel's name of the
    /// process.
    #[serde(deserialize_with = "pattern")]
    pub executable: Option<GlobMatcher>,
    /// The real user, by name or number.
    #[serde(deserialize_with = "user")]
    pub user: Option<u32>,
    /// Of the control group's path.
    #[serde(deserialize_with = "pattern")]
    pub cgroup: Option<GlobMatcher>,
    /// Of the container's id.
    #[serde(deserialize_with = "pattern")]
    pub container: Option<GlobMatcher>,
    /// How long it has run.
    #[serde(deserialize_with = "duration")]
    pub minimum_age: Duration,
    /// What is done with it.
    pub watch: Depth,
}

/// What rules are held against.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// Path and file name of the executable, and the kernel's name.
    pub names: &'a [&'a str],
    /// The real user id.
    pub uid: u32,
    /// The control group's path.
    pub cgroup: Option<&'a str>,
    /// The container's id.
    pub container: Option<&'a str>,
}

impl Rule {
    /// Whether it is meant, at whatever age.
    fn fits(&self, candidate: Candidate<'_>) -> bool {
        let is = |pattern: &Option<GlobMatcher>, text: Option<&str>| {
            pattern
                .as_ref()
                .is_none_or(|pattern| text.is_some_and(|text| pattern.is_match(text)))
        };
        let named =
            |pattern: &GlobMatcher| candidate.names.iter().any(|name| pattern.is_match(name));
        self.executable.as_ref().is_none_or(named)
            && self.user.is_none_or(|uid| uid == candidate.uid)
            && is(&self.cgroup, candidate.cgroup)
            && is(&self.container, candidate.container)
    }
}

/// How closely one process is watched at what age.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Depths {
    /// From which age on; the first of which the age is reached decides.
    by_age: Vec<(Duration, Depth)>,
    otherwise: Depth,
}

impl Depths {
    /// By these rules, the first that fits deciding.
    pub fn of(rules: &[Rule], otherwise: Depth, candidate: Candidate<'_>) -> Depths {
        let mut by_age = Vec::new();
        for rule in rules.iter().filter(|rule| rule.fits(candidate)) {
            by_age.push((rule.minimum_age, rule.watch));
            // What comes behind it is never reached.
            if rule.minimum_age.is_zero() {
                break;
            }
        }
        Depths { by_age, otherwise }
    }

    /// At this age.
    pub fn at(&self, age: Duration) -> Depth {
        let reached = self.by_age.iter().find(|(minimum, _)| *minimum <= age);
        reached.map_or(self.otherwise, |(_, depth)| *depth)
    }
}

fn pattern<'de, D: Deserializer<'de>>(from: D) -> Result<Option<GlobMatcher>, D::Error> {
    let text = String::deserialize(from)?;
    discovery::pattern(&text)
        .map(Some)
        .map_err(serde::de::Error::custom)
}

fn user<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u32>, D::Error> {
    let text = String::deserialize(from)?;
    discovery::uid(&text)
        .map(Some)
        .map_err(|error| serde::de::Error::custom(format!("{text}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ETCD: Candidate<'_> = Candidate {
        names: &["/usr/bin/etcd", "etcd"],
        uid: 7,
        cgroup: Some("/system.slice/etcd.service"),
        container: None,
    };

    fn rule(executable: &str, minimum_age: u64, watch: Depth) -> Rule {
        Rule {
            executable: Some(discovery::pattern(executable).unwrap()),
            minimum_age: Duration::from_secs(minimum_age),
            watch,
            ..Rule::default()
        }
    }

    #[test]
    fn every_condition_must_hold() {
        let fits = |rule: Rule| rule.fits(ETCD);
        assert!(fits(Rule::default()));
        assert!(fits(rule("etcd", 0, Depth::Off)));
        assert!(fits(rule("/usr/bin/*", 0, Depth::Off)));
        assert!(!fits(rule("caddy", 0, Depth::Off)));
        let user = |uid| Rule {
            user: Some(uid),
            ..rule("etcd", 0, Depth::Off)
        };
        assert!(fits(user(7)) && !fits(user(8)));
        let contained = Rule {
            container: Some(discovery::pattern("*").unwrap()),
            ..Rule::default()
        };
        assert!(!fits(contained));
        let cgroup = |text| Rule {
            cgroup: Some(discovery::pattern(text).unwrap()),
            ..Rule::default()
        };
        assert!(fits(cgroup("etcd.service")) && !fits(cgroup("user.slice")));
    }

    #[test]
    fn the_first_that_fits_and_is_old_enough_decides() {
        let rules = [
            rule("etcd", 60, Depth::Blocking),
            rule("etcd", 10, Depth::Lifecycle),
            rule("e*", 0, Depth::Off),
            rule("etcd", 5, Depth::Census),
        ];
        let depths = Depths::of(&rules, Depth::Census, ETCD);
        for (age, depth) in [
            (0, Depth::Off),
            (9, Depth::Off),
            (10, Depth::Lifecycle),
            (61, Depth::Blocking),
        ] {
            assert_eq!(depths.at(Duration::from_secs(age)), depth, "{age}");
        }
        assert_eq!(
            Depths::of(&[], Depth::Census, ETCD).at(Duration::ZERO),
            Depth::Census
        );
    }
}
