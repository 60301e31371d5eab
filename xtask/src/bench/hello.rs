//! Requests to a server that says hello, and the CPU time that they take it.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::system::cpu_seconds;

/// Connections that ask at once, each of them again and again.
const CONNECTIONS: usize = 4;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Requests for each second of CPU time that process `pid`, which listens at `address`, spends on them during `time`.
pub(super) fn rate(pid: u32, address: &str, time: Duration) -> Result<f64> {
    let before = cpu_seconds(pid)?;
    let until = Instant::now() + time;
    let asked = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CONNECTIONS)
            .map(|_| scope.spawn(|| ask(address, until)))
            .collect();
        let mut asked = 0;
        for client in clients {
            asked += client.join().expect("a client does not panic")?;
        }
        Ok::<u64, anyhow::Error>(asked)
    })?;
    let spent = cpu_seconds(pid)? - before;
    if spent <= 0.0 {
        bail!("the server answered {asked} requests without CPU time");
    }
    Ok(asked as f64 / spent)
}

/// Asks over one connection until then; the number of answers.
fn ask(address: &str, until: Instant) -> Result<u64> {
    let mut connection = TcpStream::connect(address).context("cannot reach the server")?;
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    let mut answer = [0; 4096];
    let mut asked = 0;
    while Instant::now() < until {
        connection.write_all(b"GET /hello HTTP/1.1\r\nHost: bench\r\n\r\n")?;
        // The answer is far shorter than a packet.
        let len = connection.read(&mut answer)?;
        if !answer[..len].starts_with(b"HTTP/1.1 200") {
            bail!(
                "the server answered: {}",
                String::from_utf8_lossy(&answer[..len])
            );
        }
        asked += 1;
    }
    Ok(asked)
}
