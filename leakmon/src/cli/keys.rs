//! Keys that are typed while a table is redrawn in place.

use std::future::pending;
use std::io::{self, IsTerminal as _, Read as _};

use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use nix::unistd::{getpgrp, tcgetpgrp};
use tokio::sync::oneshot;

/// Typed keys, each as it comes and unseen, until it is dropped.
pub(super) struct Keys(Option<Listening>);

struct Listening {
    quit: oneshot::Receiver<()>,
    /// How the terminal was before.
    before: Termios,
}

impl Keys {
    /// Listens where there is somebody to type: on a terminal that belongs to leakmon, not where it was started behind
    /// a shell, whose keys they are (to read them would stop leakmon).
    pub(super) fn listen() -> Self {
        Self(Listening::start().ok().flatten())
    }

    /// None at all.
    pub(super) fn none() -> Self {
        Self(None)
    }

    /// Returns when `q` was typed.
    pub(super) async fn quit(&mut self) {
        if let Some(listening) = &mut self.0 {
            if (&mut listening.quit).await.is_ok() {
                return;
            }
            // The terminal is gone; a signal says what follows from it.
            self.0 = None;
        }
        pending().await
    }
}

impl Listening {
    fn start() -> io::Result<Option<Self>> {
        let input = io::stdin();
        if !input.is_terminal() || tcgetpgrp(&input)? != getpgrp() {
            return Ok(None);
        }
        let before = tcgetattr(&input)?;
        let mut single = before.clone();
        single
            .local_flags
            .remove(LocalFlags::ICANON | LocalFlags::ECHO);
        tcsetattr(&input, SetArg::TCSANOW, &single)?;
        let (typed, quit) = oneshot::channel();
        // It ends with the process: nothing wakes who waits for a key.
        std::thread::spawn(move || {
            let mut keys = input.lock().bytes().map_while(Result::ok);
            if keys.any(|key| key == b'q') {
                let _ = typed.send(());
            }
        });
        Ok(Some(Self { quit, before }))
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.before);
    }
}
