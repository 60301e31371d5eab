//! What was found in a program, shared by the processes that run it.
//!
//! Some of it is read from the memory of the first of them, which its user can
//! write to: so only processes of one user share.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Findings of files that no process under watch uses, kept for the next that
/// runs one.
const SPARE: usize = 1024;

/// Names the content of a file for as long as it is not written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileId {
    /// Of an open file.
    ///
    /// # Errors
    /// What fstat(2) says.
    pub fn of(file: &File) -> io::Result<FileId> {
        let about = file.metadata()?;
        Ok(FileId {
            device: about.dev(),
            inode: about.ino(),
            size: about.size(),
            modified: (about.mtime(), about.mtime_nsec()),
            changed: (about.ctime(), about.ctime_nsec()),
        })
    }
}

/// Findings by file. What is in use stays; of the rest only [`SPARE`].
#[derive(Debug)]
pub struct Shared<T> {
    found: Mutex<HashMap<(FileId, u32), Arc<T>>>,
}

impl<T> Default for Shared<T> {
    fn default() -> Self {
        Shared {
            found: Mutex::default(),
        }
    }
}

impl<T> Shared<T> {
    /// What was found in `file` as a process of user `uid` runs it, or what
    /// `find` finds now. Two that ask at once may both look.
    ///
    /// # Errors
    /// What fstat(2) says.
    pub fn get(&self, file: &File, uid: u32, find: impl FnOnce() -> T) -> io::Result<Arc<T>> {
        let id = (FileId::of(file)?, uid);
        if let Some(found) = self.lock().get(&id) {
            return Ok(Arc::clone(found));
        }
        let found = Arc::new(find());
        let mut all = self.lock();
        if all.len() >= SPARE {
            all.retain(|_, found| Arc::strong_count(found) > 1);
        }
        Ok(Arc::clone(all.entry(id).or_insert(found)))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(FileId, u32), Arc<T>>> {
        // A panic leaves the map as it was.
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_file_is_looked_at_once_until_it_changes() {
        let mut file = tempfile::tempfile().unwrap();
        let shared = Shared::default();
        let first = shared.get(&file, 0, || 1).unwrap();
        assert_eq!(*shared.get(&file, 0, || 2).unwrap(), *first);
        file.write_all(b"changed").unwrap();
        assert_eq!(*shared.get(&file, 0, || 3).unwrap(), 3);
        let other = tempfile::tempfile().unwrap();
        assert_eq!(*shared.get(&other, 0, || 4).unwrap(), 4);
        assert_eq!(*shared.get(&other, 1, || 5).unwrap(), 5, "another user's");
    }

    #[test]
    fn what_is_in_use_stays() {
        let shared = Shared::default();
        let kept = tempfile::tempfile().unwrap();
        let used = shared.get(&kept, 0, || usize::MAX).unwrap();
        for number in 0..SPARE + 10 {
            let file = tempfile::tempfile().unwrap();
            shared.get(&file, 0, || number).unwrap();
        }
        assert!(shared.lock().len() <= SPARE);
        assert_eq!(*shared.get(&kept, 0, || 0).unwrap(), *used);
    }
}
