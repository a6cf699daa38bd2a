//! Writes the seeds to the corpus: `cargo run --no-default-features --example seeds`.

use std::fs;
use std::path::Path;

fn main() -> std::io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for seed in vmbus_fuzz::seeds::seeds() {
        let folder = corpus.join(seed.target);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(format!("{}.seed", seed.name)), seed.bytes)?;
    }
    Ok(())
}
