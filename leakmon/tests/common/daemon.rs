//! `leakmon daemon`, running for a test.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use super::{Connection, Started, leakmon, limit, scratch, wait_until};

/// A daemon of the test's own, on a port of its own.
pub(crate) struct Daemon {
    pub(crate) child: Started,
    pub(crate) address: String,
    pub(crate) folder: tempfile::TempDir,
}

impl Daemon {
    /// With these lines in its configuration besides its address.
    pub(crate) fn start(top: &str, http: &str, rest: &str) -> Daemon {
        Daemon::every("1s", top, http, rest)
    }

    /// The same, with a reading every `interval`.
    pub(crate) fn every(interval: &str, top: &str, http: &str, rest: &str) -> Daemon {
        let folder = scratch();
        let text = format!(
            "interval = \"{interval}\"\n{top}\n[http]\nlisten = \"127.0.0.1:0\"\n{http}\n[dumps]\nfolder = \"{}\"\nkeep = 2\n{rest}\n",
            folder.path().join("dumps").display()
        );
        let config = folder.path().join("leakmon.toml");
        std::fs::write(&config, text).expect("a configuration");
        Daemon::run(folder, leakmon(["daemon", "--config"]).arg(&config))
    }

    /// One that this command starts, with its configuration in `folder`.
    pub(crate) fn run(folder: tempfile::TempDir, command: &mut Command) -> Daemon {
        let child = Started::start(command);
        let address = loop {
            let line = child.wait_for_line();
            if let Some(address) = line.trim().strip_prefix("listening on ") {
                break address.to_owned();
            }
        };
        let daemon = Daemon {
            child,
            address,
            folder,
        };
        wait_until("it has read the processes", || {
            daemon
                .raw("GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                .starts_with("HTTP/1.1 200")
        });
        daemon
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.folder.path().join("leakmon.toml")
    }

    #[track_caller]
    pub(crate) fn get(&self, path: &str) -> String {
        let mut connection = Connection::open(&self.address).expect("a connection");
        connection.get(path)
    }

    #[track_caller]
    pub(crate) fn json(&self, path: &str) -> Value {
        let text = self.get(path);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// What it answers to these bytes until it closes the connection.
    pub(crate) fn raw(&self, request: &str) -> String {
        let address: SocketAddr = self.address.parse().expect("an address");
        let mut stream = TcpStream::connect(address).expect("a connection");
        stream.set_read_timeout(Some(limit())).expect("a limit");
        // It may close before it has read all.
        let _ = stream.write_all(request.as_bytes());
        let mut answer = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(len) => answer.extend_from_slice(&buffer[..len]),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
                Err(error) => panic!("{error}"),
            }
        }
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// The value of a metric of leakmon's own.
    pub(crate) fn own_metric(&self, name: &str) -> Option<f64> {
        let text = self.get("/metrics");
        let value = |line: &str| line.strip_prefix(name)?.trim().parse().ok();
        text.lines().find_map(value)
    }

    /// The value of a metric of a process.
    pub(crate) fn metric(&self, name: &str, pid: u32) -> Option<f64> {
        let start = format!("{name}{{pid=\"{pid}\"");
        let text = self.get("/metrics");
        let line = text.lines().find(|line| line.starts_with(&start))?;
        line.rsplit(' ').next()?.parse().ok()
    }
}
