//! A Debian or Ubuntu kernel package, taken apart: the kernel as an ELF that
//! starts by PVH, and modules in the order in which they load.

use std::{
    collections::BTreeSet,
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use object::{Object, ObjectSection};

/// An unpacked kernel package.
#[derive(Debug)]
pub struct Linux {
    kernel: PathBuf,
    modules: PathBuf,
}

impl Linux {
    /// Finds kernel and modules in an unpacked tree.
    pub fn of_tree(tree: &Path) -> Result<Self> {
        let kernel = entry(&tree.join("boot"), "vmlinuz-")
            .ok_or_else(|| anyhow!("no kernel in {}", tree.join("boot").display()))?;
        let modules = ["lib/modules", "usr/lib/modules"]
            .iter()
            .find_map(|place| entry(&tree.join(place), ""))
            .ok_or_else(|| anyhow!("no kernel modules in {}", tree.display()))?;
        Ok(Self { kernel, modules })
    }

    /// The kernel's release, e.g. `6.12.95-cloud-amd64`.
    pub fn release(&self) -> String {
        self.modules
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default()
    }

    /// The kernel as QEMU's `-kernel` starts it by PVH. The compressed image
    /// would be unpacked by the emulated processor, which takes seconds.
    pub fn elf(&self) -> Result<Vec<u8>> {
        let image = fs::read(&self.kernel)
            .with_context(|| format!("cannot read {}", self.kernel.display()))?;
        let elf = decompress(payload(&image)?)
            .with_context(|| format!("cannot unpack {}", self.kernel.display()))?;
        ensure!(
            elf.starts_with(b"\x7fELF"),
            "{} holds no ELF",
            self.kernel.display()
        );
        Ok(elf)
    }

    /// These modules and all that they depend on, unpacked, in the order in
    /// which they must be loaded; each with its name. Those that the kernel has built in are
    /// left out.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
        let mut files = Vec::new();
        collect(&self.modules.join("kernel"), &mut files)?;
        let built_in = self.built_in();
        let mut order = Vec::new();
        for name in names {
            // Distributions differ in what they build in.
            if !built_in.contains(*name) {
                self.add(name, &files, &mut BTreeSet::new(), &mut order)?;
            }
        }
        Ok(order)
    }

    /// Names of the modules that are part of the kernel itself.
    fn built_in(&self) -> BTreeSet<String> {
        let list = fs::read_to_string(self.modules.join("modules.builtin"));
        let list = list.unwrap_or_default();
        let names = list.lines().map(Path::new).filter_map(module_name);
        names.collect()
    }

    fn add(
        &self,
        name: &str,
        files: &[PathBuf],
        under_way: &mut BTreeSet<String>,
        order: &mut Vec<(String, Vec<u8>)>,
    ) -> Result<()> {
        let name = name.replace('-', "_");
        if order.iter().any(|(done, _)| *done == name) {
            return Ok(());
        }
        ensure!(
            under_way.insert(name.clone()),
            "module {name} depends on itself"
        );
        let file = files
            .iter()
            .find(|file| module_name(file).is_some_and(|own| own == name))
            .ok_or_else(|| anyhow!("kernel {} has no module {name}", self.release()))?;
        let packed = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        let module = if packed.starts_with(b"\x7fELF") {
            packed
        } else {
            decompress(&packed).with_context(|| format!("cannot unpack {}", file.display()))?
        };
        for needed in dependencies(&module)? {
            self.add(&needed, files, under_way, order)?;
        }
        order.push((name, module));
        Ok(())
    }
}

/// The compressed kernel inside a bzImage (Linux boot protocol, fields
/// setup_sects at 0x1f1, header magic at 0x202, payload_offset at 0x248 and
/// payload_length at 0x24c).
fn payload(image: &[u8]) -> Result<&[u8]> {
    let field = |at: usize| {
        let bytes = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    let slice = || {
        image.get(0x202..0x206).filter(|magic| magic == b"HdrS")?;
        let setup = (usize::from(*image.get(0x1f1)?) + 1) * 512;
        let start = setup + field(0x248)?;
        image.get(start..start + field(0x24c)?)
    };
    slice().ok_or_else(|| anyhow!("the kernel is no bzImage"))
}

/// Unpacks zstd or xz, told by their magic numbers. What follows the packed
/// data (the kernel build appends the unpacked size) is ignored.
fn decompress(packed: &[u8]) -> Result<Vec<u8>> {
    let mut unpacked = Vec::new();
    if packed.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        let mut decoder = ruzstd::decoding::StreamingDecoder::new(packed)
            .map_err(|error| anyhow!("bad zstd data: {error}"))?;
        decoder.read_to_end(&mut unpacked)?;
    } else if packed.starts_with(&[0xfd, b'7', b'z', b'X', b'Z', 0]) {
        lzma_rust2::XzReader::new(packed, false).read_to_end(&mut unpacked)?;
    } else {
        bail!("it is packed in a way that is not known here");
    }
    Ok(unpacked)
}

/// Names in the `depends=` line of a module's information section.
fn dependencies(module: &[u8]) -> Result<Vec<String>> {
    let file = object::File::parse(module).context("a module is no ELF")?;
    let section = file
        .section_by_name(".modinfo")
        .ok_or_else(|| anyhow!("a module has no .modinfo section"))?;
    Ok(section
        .data()?
        .split(|byte| *byte == 0)
        .filter_map(|line| std::str::from_utf8(line).ok()?.strip_prefix("depends="))
        .flat_map(|names| names.split(','))
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect())
}

/// `kvm-amd.ko.xz` is the module `kvm_amd`.
fn module_name(file: &Path) -> Option<String> {
    let (stem, _) = file.file_name()?.to_str()?.split_once(".ko")?;
    Some(stem.replace('-', "_"))
}

/// An entry of `directory` whose name begins with `prefix`; the last by name.
fn entry(directory: &Path, prefix: &str) -> Option<PathBuf> {
    let mut found: Vec<_> = fs::read_dir(directory)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(prefix))
        })
        .collect();
    found.sort();
    found.pop()
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), files)?;
        } else {
            files.push(entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_is_found_behind_the_setup_sectors() {
        let mut image = vec![0; 0x2000];
        image[0x1f1] = 3;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248] = 0x10;
        image[0x24c] = 4;
        let start = 4 * 512 + 0x10;
        image[start..start + 4].copy_from_slice(b"pack");
        assert_eq!(payload(&image).unwrap(), b"pack");
        image[0x24e] = 0xff;
        assert!(payload(&image).is_err(), "beyond the end");
        assert!(payload(b"short").is_err());
    }

    #[test]
    fn unknown_packing_is_said() {
        let error = decompress(b"plain").unwrap_err();
        assert!(error.to_string().contains("not known"));
    }

    #[test]
    fn what_is_built_in_is_no_module() {
        let directory = tempfile::tempdir().unwrap();
        let list = directory.path().join("modules.builtin");
        fs::write(
            list,
            "kernel/drivers/virtio/virtio_pci.ko\nkernel/fs/ext4/ext4.ko\n",
        )
        .unwrap();
        fs::create_dir(directory.path().join("kernel")).unwrap();
        let linux = Linux {
            kernel: PathBuf::new(),
            modules: directory.path().to_owned(),
        };
        assert!(linux.modules(&["virtio_pci", "ext4"]).unwrap().is_empty());
        assert!(linux.modules(&["virtio_blk"]).is_err());
    }

    #[test]
    fn module_names_come_from_file_names() {
        let name = |file: &str| module_name(Path::new(file));
        assert_eq!(name("/m/kvm-amd.ko.xz").as_deref(), Some("kvm_amd"));
        assert_eq!(name("/m/irqbypass.ko").as_deref(), Some("irqbypass"));
        assert_eq!(name("/m/modules.builtin"), None);
    }
}
