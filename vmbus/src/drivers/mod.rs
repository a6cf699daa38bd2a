//! Drivers for what hosts offer (VSCs), each written against [`kmcl`](crate::kmcl) and nothing else.

pub mod balloon;
pub mod ic;
pub mod shutdown;
pub mod standing;
pub mod time_sync;
pub mod wall_clock;

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::string::String;
    use std::vec::Vec;

    /// Every source file below `folder`.
    fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }

    /// The modules of this crate that a source text names, as `crate::NAME` or from a list `crate::{...}`.
    fn named_modules(text: &str) -> Vec<String> {
        let word = |text: &str| -> String {
            text.chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect()
        };
        let mut names = Vec::new();
        for part in text.split("crate::").skip(1) {
            match part.strip_prefix('{') {
                Some(list) => {
                    let list = list.split(';').next().unwrap_or_default();
                    let mut depth = 0;
                    let mut start = 0;
                    for (at, c) in list.char_indices() {
                        match c {
                            '{' => depth += 1,
                            '}' if depth == 0 => {
                                names.push(word(list[start..at].trim()));
                                break;
                            }
                            '}' => depth -= 1,
                            ',' if depth == 0 => {
                                names.push(word(list[start..at].trim()));
                                start = at + 1;
                            }
                            _ => {}
                        }
                    }
                }
                None => names.push(word(part)),
            }
        }
        names.retain(|name| !name.is_empty());
        names
    }

    #[test]
    fn the_search_for_names_finds_them() {
        let text = "use crate::{kmcl::{a, b}, bus, ring::Ring};\nlet x = crate::protocol::f();";
        assert_eq!(named_modules(text), ["kmcl", "bus", "ring", "protocol"]);
    }

    /// That drivers need nothing but KMCL is what shows that KMCL is complete.
    #[test]
    fn drivers_name_no_module_of_the_crate_but_kmcl() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/drivers");
        let mut files = Vec::new();
        sources(&folder, &mut files);
        files.retain(|file| *file != folder.join("mod.rs"));
        assert!(!files.is_empty());
        for file in files {
            let text = fs::read_to_string(&file).unwrap();
            for name in named_modules(&text) {
                assert!(
                    name == "kmcl" || name == "drivers",
                    "{} names crate::{name}",
                    file.display()
                );
            }
            for name in [
                "super::super::super",
                "vmbus::bus",
                "vmbus::ring",
                "vmbus::protocol",
            ] {
                assert!(!text.contains(name), "{} names {name}", file.display());
            }
        }
    }
}
