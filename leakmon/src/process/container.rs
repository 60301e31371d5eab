//! What a process's control group says of who runs it: systemd's unit, the
//! container, the pod.
//!
//! | path | made by |
//! |---|---|
//! | `/system.slice/a.service` | systemd |
//! | `/docker/ID`, `/system.slice/docker-ID.scope` | Docker, with the cgroupfs and the systemd driver |
//! | `/machine.slice/libpod-ID.scope`, `.../libpod-ID` | Podman |
//! | `/kubepods/burstable/podUID/ID` | Kubernetes, cgroupfs driver |
//! | `/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podUID.slice/cri-containerd-ID.scope` | Kubernetes, systemd driver, containerd; `crio-ID.scope` is CRI-O's |
//! | `/system.slice/containerd.service/kubepods-burstable-podUID.slice:cri-containerd:ID` | containerd whose cgroup driver is not the kubelet's |
//! | `/NAMESPACE/ID` | containerd by itself (`ctr`), with its own namespace |
//! | `/ecs/TASK/ID`, `/ecs/ID` | Amazon's ECS |

/// Who runs a process, as far as its control group tells.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Placement {
    /// systemd's unit: `nginx.service`.
    pub unit: Option<String>,
    /// The innermost container's id.
    pub container: Option<String>,
    /// What runs the container: `docker`, `podman`, `containerd`, `cri-o`; `None`
    /// where the path does not tell.
    pub engine: Option<&'static str>,
    /// The pod's uid, with dashes.
    pub pod: Option<String>,
    /// containerd's namespace.
    pub namespace: Option<String>,
}

/// Engines by what stands before a container's id in the name of its scope.
const SCOPES: [(&str, &str); 7] = [
    ("docker-", "docker"),
    ("libpod-", "podman"),
    ("cri-containerd-", "containerd"),
    ("nerdctl-", "containerd"),
    ("crio-", "cri-o"),
    ("cri-o-", "cri-o"),
    ("cri-containerd:", "containerd"),
];

impl Placement {
    /// Of a path in `/proc/PID/cgroup`.
    pub fn of(path: &str) -> Placement {
        let mut found = Placement::default();
        let mut before: Vec<&str> = Vec::new();
        for component in path.split('/').filter(|component| !component.is_empty()) {
            // containerd's own form has slice, prefix and id in one.
            if let Some((slice, rest)) = component.split_once(':') {
                found.pod = pod(slice).or(found.pod);
                if let Some(id) = scope(rest) {
                    found.contain(id);
                }
            } else if let Some(id) = scope(component.strip_suffix(".scope").unwrap_or(component)) {
                found.contain(id);
            } else if is_id(component) {
                found.contain((component, engine(&before)));
                found.namespace = match before[..] {
                    [namespace] if !KNOWN_PARENTS.contains(&namespace) => {
                        Some(namespace.to_owned())
                    }
                    _ => None,
                };
            } else if component.ends_with(".service") {
                found.unit = Some(component.to_owned());
            } else {
                found.pod = pod(component).or(found.pod);
            }
            before.push(component);
        }
        found
    }

    /// What is around a container is of its host.
    fn contain(&mut self, (id, engine): (&str, Option<&'static str>)) {
        self.container = Some(id.to_owned());
        self.engine = engine;
        self.unit = None;
        self.namespace = None;
    }
}

/// Folders that are not containerd's namespaces.
const KNOWN_PARENTS: [&str; 5] = ["docker", "ecs", "kubepods", "libpod_parent", "lxc"];

/// The id in a scope's name without `.scope`, and whose it is.
fn scope(name: &str) -> Option<(&str, Option<&'static str>)> {
    SCOPES.iter().find_map(|(prefix, engine)| {
        let id = name.strip_prefix(prefix)?;
        is_id(id).then_some((id, Some(*engine)))
    })
}

/// Whose container lies in these folders.
fn engine(folders: &[&str]) -> Option<&'static str> {
    match folders {
        [.., "docker"] => Some("docker"),
        [.., "libpod_parent"] => Some("podman"),
        [_] if !KNOWN_PARENTS.contains(&folders[0]) => Some("containerd"),
        _ => None,
    }
}

/// Containers have 64 hexadecimal digits, ECS's 32 and a number behind a dash.
fn is_id(text: &str) -> bool {
    let hex = |text: &str, len| {
        text.len() == len
            && text
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let ecs = || {
        let (id, number) = text.split_once('-')?;
        let number = (1..=20).contains(&number.len()) && number.bytes().all(|b| b.is_ascii_digit());
        Some(hex(id, 32) && number)
    };
    hex(text, 64) || ecs().unwrap_or(false)
}

/// The uid in `podUID` and `kubepods-burstable-podUID.slice`: with dashes, or with
/// underscores in a slice's name; static pods have 32 digits without either.
fn pod(component: &str) -> Option<String> {
    let name = component.strip_suffix(".slice").unwrap_or(component);
    let at = name.rfind("pod")?;
    let (before, uid) = (&name[..at], &name[at + 3..]);
    if !(before.is_empty() || before.ends_with('-')) {
        return None;
    }
    let uid = uid.replace('_', "-");
    let digits = uid.bytes().filter(u8::is_ascii_hexdigit).count();
    let dashes = uid.bytes().filter(|b| *b == b'-').count();
    let whole = digits + dashes == uid.len() && digits == 32 && matches!(dashes, 0 | 4);
    whole.then_some(uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    const UID: &str = "1b4e28ba-2fa1-11d2-883f-0016d3cca427";

    fn of(path: &str) -> [Option<String>; 5] {
        let path = path
            .replace("ID", ID)
            .replace("UNDERSCORED", &UID.replace('-', "_"))
            .replace("DASHED", UID);
        let Placement {
            unit,
            container,
            engine,
            pod,
            namespace,
        } = Placement::of(&path);
        [unit, container, engine.map(str::to_owned), pod, namespace]
    }

    fn expected(words: [&str; 5]) -> [Option<String>; 5] {
        words.map(|word| match word {
            "" => None,
            "ID" => Some(ID.to_owned()),
            "UID" => Some(UID.to_owned()),
            word => Some(word.to_owned()),
        })
    }

    #[test]
    fn paths_of_every_maker() {
        for (path, words) in [
            (
                "/system.slice/nginx.service",
                ["nginx.service", "", "", "", ""],
            ),
            (
                "/user.slice/user-1000.slice/user@1000.service/app.slice/app.service",
                ["app.service", "", "", "", ""],
            ),
            ("/docker/ID", ["", "ID", "docker", "", ""]),
            (
                "/system.slice/docker-ID.scope",
                ["", "ID", "docker", "", ""],
            ),
            (
                "/docker/ID/system.slice/ssh.service",
                ["ssh.service", "ID", "docker", "", ""],
            ),
            (
                "/machine.slice/libpod-ID.scope/container",
                ["", "ID", "podman", "", ""],
            ),
            (
                "/kubepods/burstable/podDASHED/ID",
                ["", "ID", "", "UID", ""],
            ),
            (
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podUNDERSCORED.slice/cri-containerd-ID.scope",
                ["", "ID", "containerd", "UID", ""],
            ),
            (
                "/kubepods.slice/kubepods-podUNDERSCORED.slice/crio-ID.scope",
                ["", "ID", "cri-o", "UID", ""],
            ),
            (
                "/system.slice/containerd.service/kubepods-besteffort-podUNDERSCORED.slice:cri-containerd:ID",
                ["", "ID", "containerd", "UID", ""],
            ),
            ("/default/ID", ["", "ID", "containerd", "", "default"]),
            ("/k8s.io/ID", ["", "ID", "containerd", "", "k8s.io"]),
            (
                "/ecs/0123456789abcdef0123456789abcdef/0123456789abcdef0123456789abcdef-1234567890",
                [
                    "",
                    "0123456789abcdef0123456789abcdef-1234567890",
                    "",
                    "",
                    "",
                ],
            ),
            ("/", ["", "", "", "", ""]),
            ("", ["", "", "", "", ""]),
            ("/user.slice/podium.slice", ["", "", "", "", ""]),
            ("/system.slice/docker-short.scope", ["", "", "", "", ""]),
            ("/a:b/:/::ID", ["", "", "", "", ""]),
        ] {
            assert_eq!(of(path), expected(words), "{path}");
        }
    }
}
