//! `leakmon doctor`.
use super::{Exit, Failure};
/// Runs the command.
///
/// # Errors
/// None yet.
pub fn run() -> Result<Exit, Failure> {
    Ok(Exit::Success)
}
