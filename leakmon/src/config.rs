//! The daemon's configuration: one TOML file, of which `deploy/leakmon.toml`
//! documents every key. What is not known is an error: a misspelt key must not
//! silently leave a limit where it was.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer};

use crate::watch::rules::Rule;

/// Most bytes of a configuration that are read.
const MAX_BYTES: u64 = 1 << 20;

/// Most rules that are believed to be meant.
const MAX_RULES: usize = 1000;

/// Most bytes of a bearer token.
pub(crate) const MAX_TOKEN: u64 = 1024;

/// What has to be written where everybody may read the figures of every process.
const EXPOSED: &str = "anyone who can connect may read everything";

/// Everything that a daemon is told.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Between two censuses of a process.
    #[serde(deserialize_with = "duration")]
    pub interval: Duration,
    /// CPU time that probes may cost a process, in percent of what it uses itself.
    pub max_overhead: f64,
    /// Sites of a process and runtime that are exported, by live and by blocked
    /// tasks.
    pub top_sites: usize,
    /// Read `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` of the processes'
    /// environments.
    pub otel_environment: bool,
    /// Who is watched, and how closely: the first that fits decides.
    pub rules: Vec<Rule>,
    /// The HTTP server.
    pub http: Http,
    /// OTLP; `None`: nothing is sent.
    pub otlp: Option<Otlp>,
    /// What SIGUSR1 writes.
    pub dumps: Dumps,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            interval: Duration::from_secs(10),
            max_overhead: 1.0,
            top_sites: 10,
            otel_environment: false,
            rules: Vec::new(),
            http: Http::default(),
            otlp: None,
            dumps: Dumps::default(),
        }
    }
}

/// The HTTP server, and what it gives to whom.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Http {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Certificates and private key, in PEM.
    pub certificate: Option<PathBuf>,
    /// See `certificate`.
    pub key: Option<PathBuf>,
    /// A file with a token that every request must bear.
    pub token_file: Option<PathBuf>,
    /// The words of [`EXPOSED`], to listen on other addresses than loopback
    /// without TLS or token.
    pub exposed: Option<String>,
    /// Whether stacks are given out.
    pub stacks: bool,
    /// Connections at once.
    pub connections: usize,
    /// How long a request may take.
    #[serde(deserialize_with = "duration")]
    pub timeout: Duration,
}

impl Default for Http {
    fn default() -> Http {
        Http {
            listen: SocketAddr::from(([127, 0, 0, 1], 9464)),
            certificate: None,
            key: None,
            token_file: None,
            exposed: None,
            stacks: true,
            connections: 64,
            timeout: Duration::from_secs(30),
        }
    }
}

/// Where figures are sent by OTLP.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Otlp {
    /// The collector: `http://127.0.0.1:4317`.
    pub endpoint: String,
    /// How it is spoken to.
    #[serde(default)]
    pub protocol: Protocol,
    /// Between two sendings.
    #[serde(default = "Otlp::interval", deserialize_with = "duration")]
    pub interval: Duration,
    /// Sendings that are kept for a collector that does not answer.
    #[serde(default = "Otlp::queue")]
    pub queue: usize,
}

impl Otlp {
    fn interval() -> Duration {
        Duration::from_secs(30)
    }

    fn queue() -> usize {
        20
    }
}

/// How OTLP is carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Protocol buffers over gRPC.
    #[default]
    Grpc,
    /// Protocol buffers over HTTP.
    Http,
}

/// What SIGUSR1 writes, and where.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Dumps {
    /// The folder.
    pub folder: PathBuf,
    /// Dumps that are kept.
    pub keep: usize,
}

impl Default for Dumps {
    fn default() -> Dumps {
        Dumps {
            folder: PathBuf::from("/var/log/leakmon"),
            keep: 5,
        }
    }
}

/// Why a configuration is not taken.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("the configuration {path} cannot be read: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not TOML, or has other keys or kinds of values than there are.
    #[error("{path}:{line}: {message}")]
    Syntax {
        /// In which file.
        path: PathBuf,
        /// In which line, from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// Its values do not fit each other, or nothing.
    #[error("{path}: {message}")]
    Value {
        /// In which file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// [`ConfigError`] names the line.
    pub fn read(path: &Path) -> Result<Config, ConfigError> {
        use std::io::Read as _;
        let file_error = |source| ConfigError::File {
            path: path.to_owned(),
            source,
        };
        let mut text = String::new();
        std::fs::File::open(path)
            .and_then(|file| file.take(MAX_BYTES + 1).read_to_string(&mut text))
            .map_err(file_error)?;
        if text.len() as u64 > MAX_BYTES {
            return Err(ConfigError::Value {
                path: path.to_owned(),
                message: "it is larger than 1 MiB".to_owned(),
            });
        }
        Config::parse(&text, path)
    }

    /// Reads the text of the file at `path`.
    ///
    /// # Errors
    /// As [`Config::read`].
    pub fn parse(text: &str, path: &Path) -> Result<Config, ConfigError> {
        let config: Config = toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start.min(text.len()));
            ConfigError::Syntax {
                path: path.to_owned(),
                line: text.as_bytes()[..at]
                    .iter()
                    .filter(|b| **b == b'\n')
                    .count()
                    + 1,
                message: error.message().to_owned(),
            }
        })?;
        match config.fault() {
            None => Ok(config),
            Some(message) => Err(ConfigError::Value {
                path: path.to_owned(),
                message,
            }),
        }
    }

    /// What no value may be, or not together.
    fn fault(&self) -> Option<String> {
        let Http {
            listen,
            certificate,
            key,
            token_file,
            exposed,
            connections,
            ..
        } = &self.http;
        let says = |message: &str| Some(message.to_owned());
        if !(0.0..=100.0).contains(&self.max_overhead) {
            return says("max_overhead must be from 0 to 100");
        }
        if self.interval < Duration::from_secs(1) {
            return says("interval must be at least 1s");
        }
        if !(1..=1000).contains(&self.top_sites) {
            return says("top_sites must be from 1 to 1000");
        }
        if self.rules.len() > MAX_RULES {
            return says("there are more than 1000 rules");
        }
        if !(1..=10_000).contains(connections) {
            return says("http.connections must be from 1 to 10000");
        }
        if certificate.is_some() != key.is_some() {
            return says("http.certificate and http.key are needed together");
        }
        if exposed.as_deref().is_some_and(|words| words != EXPOSED) {
            return Some(format!("http.exposed must be absent or \"{EXPOSED}\""));
        }
        let guarded = certificate.is_some() || token_file.is_some() || exposed.is_some();
        if !is_loopback(listen.ip()) && !guarded {
            return Some(format!(
                "http.listen is {listen}, which others can reach: give http.certificate and \
                 http.key, or http.token_file, or http.exposed = \"{EXPOSED}\""
            ));
        }
        if self.dumps.keep == 0 {
            return says("dumps.keep must be at least 1");
        }
        if let Some(otlp) = &self.otlp {
            if otlp.interval < Duration::from_secs(1) {
                return says("otlp.interval must be at least 1s");
            }
            if !(1..=1000).contains(&otlp.queue) {
                return says("otlp.queue must be from 1 to 1000");
            }
            let scheme = ["http://", "https://"]
                .iter()
                .any(|scheme| otlp.endpoint.starts_with(scheme));
            if !scheme {
                return says("otlp.endpoint must begin with http:// or https://");
            }
        }
        None
    }
}

fn is_loopback(ip: IpAddr) -> bool {
    ip.to_canonical().is_loopback()
}

/// `10s`, `1m 30s`.
pub(crate) fn duration<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(from)?;
    humantime::parse_duration(&text).map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("x.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn nothing_is_the_default() {
        let config = parse("").unwrap();
        assert_eq!(config.interval, Duration::from_secs(10));
        assert!(config.http.listen.ip().is_loopback());
        assert!(config.rules.is_empty() && config.otlp.is_none());
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, wrong) in [
            (
                "interval = \"10s\"\nintervall = \"10s\"\n",
                "x.toml:2: unknown field `intervall`",
            ),
            ("[http]\n\nlisten = 7\n", "x.toml:3: "),
            (
                "[[rules]]\nwatch = \"all\"\n",
                "x.toml:2: unknown variant `all`",
            ),
            ("[[rules]]\nexecutable = \"[\"\n", "x.toml:2: "),
            ("[[rules]]\nuser = \"no such user here\"\n", "no such user"),
            ("interval = \"10ms\"", "x.toml: interval must be"),
            ("max_overhead = nan", "x.toml: max_overhead"),
            (
                "[otlp]\nendpoint = \"collector:4317\"",
                "x.toml: otlp.endpoint",
            ),
            ("[otlp]\n", "missing field `endpoint`"),
            (
                "[http]\nlisten = \"0.0.0.0:9464\"",
                "which others can reach",
            ),
            (
                "[http]\nlisten = \"[::ffff:10.0.0.1]:1\"",
                "which others can reach",
            ),
            ("[http]\nexposed = \"yes\"", "http.exposed must be"),
            ("[http]\nkey = \"x\"", "needed together"),
            ("a = ", "x.toml:1: "),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(wrong), "{text:?}: {error}");
        }
    }

    #[test]
    fn addresses_that_others_reach_must_be_meant() {
        for guarded in [
            "listen = \"127.0.0.2:1\"",
            "listen = \"[::1]:1\"",
            "listen = \"0.0.0.0:1\"\ntoken_file = \"t\"",
            "listen = \"0.0.0.0:1\"\ncertificate = \"c\"\nkey = \"k\"",
            "listen = \"0.0.0.0:1\"\nexposed = \"anyone who can connect may read everything\"",
        ] {
            assert!(parse(&format!("[http]\n{guarded}")).is_ok(), "{guarded}");
        }
    }
}
