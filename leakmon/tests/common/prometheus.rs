//! A real Prometheus server, running for a test.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use super::{Connection, Owned, scratch, wait_until};

/// It scrapes one address every second.
pub(crate) struct Prometheus {
    address: SocketAddr,
    _child: Owned,
    _folder: tempfile::TempDir,
}

impl Prometheus {
    /// Starts `program` with these rules, and waits until it is ready.
    pub(crate) fn start(program: &Path, scraped: &str, rules: &str) -> Prometheus {
        let folder = scratch();
        std::fs::write(folder.path().join("rules.yml"), rules).expect("the rules");
        let config = format!(
            "global:\n  scrape_interval: 1s\n  evaluation_interval: 1s\nrule_files: [rules.yml]\n\
             scrape_configs:\n  - job_name: leakmon\n    static_configs:\n      - targets: [\"{scraped}\"]\n"
        );
        let path = folder.path().join("prometheus.yml");
        std::fs::write(&path, config).expect("a configuration");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        drop(listener);
        let data = folder.path().join("data");
        let child = Owned::spawn(
            Command::new(program)
                .arg(format!("--config.file={}", path.display()))
                .arg(format!("--storage.tsdb.path={}", data.display()))
                .arg(format!("--web.listen-address={address}"))
                .stdout(Stdio::null())
                .stderr(Stdio::null()),
        );
        wait_until("Prometheus is ready", || {
            let Ok(mut stream) = TcpStream::connect(address) else {
                return false;
            };
            let _ = stream.write_all(b"GET /-/ready HTTP/1.0\r\n\r\n");
            let mut answer = String::new();
            let _ = stream.read_to_string(&mut answer);
            answer.contains(" 200 ")
        });
        Prometheus {
            address,
            _child: child,
            _folder: folder,
        }
    }

    /// The answer to a request of its API.
    #[track_caller]
    pub(crate) fn ask(&self, path: &str) -> Value {
        let mut connection = Connection::open(&self.address.to_string()).expect("Prometheus");
        serde_json::from_str(&connection.get(path)).expect("JSON")
    }

    /// The series that an expression gives now. Prometheus must understand it.
    #[track_caller]
    pub(crate) fn query(&self, expression: &str) -> Vec<Value> {
        let encoded: String = expression
            .bytes()
            .map(|byte| format!("%{byte:02x}"))
            .collect();
        let found = self.ask(&format!("/api/v1/query?query={encoded}"));
        let series = found["data"]["result"].as_array();
        series
            .unwrap_or_else(|| panic!("{expression}: {found}"))
            .clone()
    }
}
