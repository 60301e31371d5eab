//! Keys that are typed while a table is redrawn in place.

use std::future::pending;
use std::io::{self, IsTerminal as _};
use std::os::fd::AsFd as _;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use nix::unistd::{getpgrp, read, tcgetpgrp};

/// How often the terminal is asked. A reader that waits would take keys that are typed for the shell, and would stop
/// leakmon where it was sent behind the shell.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Typed keys, each as it comes and unseen, until it is dropped.
pub(super) struct Keys {
    /// There is a terminal to type on.
    open: bool,
    /// How it was before.
    before: Option<Termios>,
}

impl Keys {
    /// Listens where a table is live and there is somebody to type.
    pub(super) fn listen(live: bool) -> Self {
        let mut keys = Self {
            open: live && io::stdin().is_terminal(),
            before: None,
        };
        keys.open = keys.open && keys.take().is_ok();
        keys
    }

    /// Returns when `q` was typed.
    pub(super) async fn quit(&mut self) {
        while self.open {
            match self.look() {
                Ok(true) => return,
                Ok(false) => tokio::time::sleep(LOOK_EVERY).await,
                // The terminal is gone; a signal says what follows from it.
                Err(_) => self.open = false,
            }
        }
        pending().await
    }

    /// Has the terminal give each key as it comes, and not show it; a shell gives the terminal back as it was before.
    /// False while what is typed is not for leakmon.
    fn take(&mut self) -> io::Result<bool> {
        let ours = is_ours()?;
        if ours {
            let mut mode = tcgetattr(io::stdin())?;
            let shown = LocalFlags::ICANON | LocalFlags::ECHO;
            if mode.local_flags.intersects(shown) {
                self.before = Some(mode.clone());
                mode.local_flags.remove(shown);
                tcsetattr(io::stdin(), SetArg::TCSANOW, &mode)?;
            }
        }
        Ok(ours)
    }

    /// Whether `q` was typed since the last look.
    fn look(&mut self) -> io::Result<bool> {
        if !self.take()? {
            return Ok(false);
        }
        let input = io::stdin();
        let mut polled = [PollFd::new(input.as_fd(), PollFlags::POLLIN)];
        if poll(&mut polled, PollTimeout::ZERO)? == 0 {
            return Ok(false);
        }
        let mut typed = [0; 256];
        match read(&input, &mut typed)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            length => Ok(typed[..length].contains(&b'q')),
        }
    }
}

/// Whether what is typed is for leakmon, and not for a shell that has it behind it.
fn is_ours() -> io::Result<bool> {
    Ok(tcgetpgrp(io::stdin())? == getpgrp())
}

impl Drop for Keys {
    fn drop(&mut self) {
        if let Some(before) = &self.before
            && is_ours().is_ok_and(|ours| ours)
        {
            let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, before);
        }
    }
}
