//! What is read when a file is opened, in order, each part only when those before it are sound.

use std::sync::Arc;

use crate::bat::Bat;
use crate::error::{Error, Result};
use crate::header::Headers;
use crate::log::{self, Replay, Replayed};
use crate::metadata::{self, Parameters};
use crate::region::{self, Extent};
use crate::space::Space;
use crate::storage::Storage;
use crate::{MAX_FILE, MIB, SIGNATURE};

/// What a file holds.
pub struct Content {
    /// The headers.
    pub headers: Headers,
    /// What the log changes, when it is in use.
    pub replay: Option<Replay>,
    /// The disk.
    pub parameters: Parameters,
    /// Its blocks.
    pub bat: Bat,
    /// The file's space.
    pub space: Space,
}

/// The storage as it is after its log has been replayed.
pub fn view(storage: &Arc<dyn Storage>, replay: Option<&Replay>) -> Arc<dyn Storage> {
    match replay {
        Some(replay) => Arc::new(Replayed {
            storage: storage.clone(),
            replay: replay.clone(),
        }),
        None => storage.clone(),
    }
}

/// Reads all of it; changes nothing.
pub fn read(storage: &Arc<dyn Storage>) -> Result<Content> {
    let length = storage.length()?;
    let mut signature = [0; SIGNATURE.len()];
    if length < signature.len() as u64 {
        return Err(Error::NotVhdx);
    }
    storage.read_at(0, &mut signature)?;
    if signature != SIGNATURE {
        return Err(Error::NotVhdx);
    }
    if length > MAX_FILE {
        let gib = length >> 30;
        return Err(Error::Unsupported(format!("a file of {gib} GiB")));
    }
    let headers = Headers::read(storage)?;
    let replay = log::search(storage, &headers)?;
    let storage = view(storage, replay.as_ref());
    let (offset, length) = headers.log_place();
    let regions = region::read(&storage, Extent { offset, length })?;
    let parameters = metadata::read(&storage, regions.metadata)?;
    let mut space = Space::new(storage.length()?, parameters.block_size);
    for extent in &regions.all {
        space.take(*extent);
    }
    let bat = Bat::read(&storage, regions.bat, parameters, &mut space)?;
    debug_assert!(space.end() >= MIB);
    Ok(Content {
        headers,
        replay,
        parameters,
        bat,
        space,
    })
}
