//! Files that are made once and kept: their names tell what they were made of.

use std::{
    fs,
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::packages::Problem;

/// The file `KIND-KEY` in `directory`, where the key is of all that it is made from. When it is
/// not there, `make` makes its content, and older files of its kind go.
pub fn kept(
    directory: &Path,
    kind: &str,
    made_from: &[&[u8]],
    make: impl FnOnce() -> Result<Vec<u8>>,
) -> Result<PathBuf> {
    fs::create_dir_all(directory).with_context(|| format!("cannot use {}", directory.display()))?;
    let file = directory.join(format!("{kind}-{}", key(made_from)));
    if !file.is_file() {
        replace(directory, &format!("{kind}-"), &file, &make()?)?;
    }
    Ok(file)
}

/// Names a file or directory that does not change but as a whole.
pub fn stamp(path: &Path) -> Result<Vec<u8>> {
    let metadata = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    let changed = metadata.modified()?.duration_since(UNIX_EPOCH)?.as_nanos();
    Ok(format!("{} {} {changed}", path.display(), metadata.len()).into_bytes())
}

/// A name for what is made from these.
pub fn key(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let digest = hash.finalize();
    digest
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Writes `file` in one piece and removes older ones of its kind.
fn replace(directory: &Path, kind: &str, file: &Path, content: &[u8]) -> Result<()> {
    let old: Vec<_> = fs::read_dir(directory)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(kind))
        })
        .collect();
    let write = || -> std::io::Result<()> {
        let mut scratch = tempfile::NamedTempFile::new_in(directory)?;
        scratch.write_all(content)?;
        scratch.persist(file)?;
        Ok(())
    };
    write().map_err(Problem::file(file))?;
    for path in old.iter().filter(|path| *path != file) {
        match fs::remove_file(path) {
            // Another that makes the same was faster.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            removed => removed?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_file_is_made_anew_for_something_else_and_the_old_one_goes() {
        let directory = tempfile::tempdir().unwrap();
        let make = |from: &[u8], content: &[u8]| {
            kept(directory.path(), "thing", &[from], || Ok(content.to_vec())).unwrap()
        };
        let first = make(b"a", b"one");
        assert_eq!(make(b"a", b"two"), first);
        assert_eq!(fs::read(&first).unwrap(), b"one");
        let second = make(b"b", b"two");
        assert!(!first.exists() && second.exists());
    }
}
