//! What the daemon gives to others: figures to Prometheus and OpenTelemetry, and
//! whatever is asked for by HTTP.
//!
//! [`families`] makes metrics of a [`Snapshot`](crate::watch::system::Snapshot);
//! [`prometheus`] writes them, [`http`] serves them on its [`connection`]s,
//! [`otlp`] sends them. Nothing here reads a process.

pub mod connection;
pub mod families;
pub mod http;
pub mod otlp;
pub mod prometheus;
