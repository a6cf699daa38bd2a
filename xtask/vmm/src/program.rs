//! The program `enlit-vmm`: its command line, its console, and one sentence when it fails.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use crate::boot::{Entry, Image};
use crate::config::{self, Config, Device};
use crate::control::server::Ends;
use crate::machine::Machine;
use crate::partition::{Owner, Partition, Settings};
use crate::runner::{Runner, Vm};
use crate::sys;

const USAGE: &str = "usage: enlit-vmm CONFIG.json [--control-fd N] [--control PATH]";

/// Where a bzImage says what it is (spec boot.md).
const BZIMAGE_MAGIC_OFFSET: u64 = 0x202;
const BZIMAGE_MAGIC: [u8; 4] = *b"HdrS";

type Failure = Box<dyn std::error::Error>;

/// Runs the program.
pub fn main() -> ExitCode {
    match run(std::env::args_os().skip(1)) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("enlit-vmm: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: impl Iterator<Item = OsString>) -> Result<u8, Failure> {
    let Arguments { config, control } = Arguments::parse(arguments)?;
    let config = Config::read(&config)?;
    let machine = Machine::new(&config)?;
    let image = image(&config);
    let settings = settings(&config);
    let runner = Arc::clone(machine.runner());
    let make = || {
        let console = io::stdout().as_fd().try_clone_to_owned();
        let console = console.map_err(crate::Error::NoConsole)?;
        let owner: Arc<dyn Owner> = Arc::<Runner>::clone(&runner);
        let partition = Partition::new(&settings, Box::new(File::from(console)), owner)?;
        partition.load(&image)?;
        Ok(Arc::new(partition) as Arc<dyn Vm>)
    };
    let typist = Arc::clone(machine.runner());
    // It ends with the program: nobody can take back a read of a terminal.
    thread::Builder::new()
        .name("console".into())
        .spawn(move || type_to(&typist))?;
    Ok(machine.run(control, make)?)
}

/// Gives the guest what comes on standard input, until its end.
fn type_to(runner: &Runner) {
    let mut bytes = [0; 512];
    let mut input = io::stdin().lock();
    loop {
        match input.read(&mut bytes) {
            Ok(0) => return,
            Ok(count) => runner.feed_console(bytes.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// The command line.
#[derive(Debug)]
struct Arguments {
    config: PathBuf,
    control: Ends,
}

impl Arguments {
    fn parse(mut arguments: impl Iterator<Item = OsString>) -> Result<Self, Failure> {
        let mut config = None;
        let mut control = Ends::default();
        while let Some(argument) = arguments.next() {
            if argument == "--control-fd" {
                let number = arguments.next();
                let number = number.as_deref().and_then(OsStr::to_str);
                let number = number.and_then(|number| number.parse::<RawFd>().ok());
                let number = number.ok_or("--control-fd needs the number of a descriptor")?;
                let stream = sys::descriptor::inherited(number)
                    .map_err(|error| format!("descriptor {number} is not open: {error}"))?;
                control.stream = Some(stream);
            } else if argument == "--control" {
                let path = arguments.next().ok_or("--control needs a path")?;
                control.path = Some(path.into());
            } else if config.is_none() && !argument.as_encoded_bytes().starts_with(b"-") {
                config = Some(argument.into());
            } else {
                return Err(USAGE.into());
            }
        }
        let config = config.ok_or(USAGE)?;
        Ok(Self { config, control })
    }
}

fn settings(config: &Config) -> Settings {
    let added = config.devices.iter().map(|device| match device {
        Device::Balloon(balloon) => u64::from(balloon.hot_add_mib),
        _ => 0,
    });
    Settings {
        memory_mib: u64::from(config.memory_mib),
        hot_add_mib: added.sum(),
        vps: config.cpus,
        hibernation: config.hibernation,
    }
}

fn image(config: &Config) -> Image {
    let entry = match config.entry {
        Some(config::Entry::Pvh) => Entry::Pvh,
        Some(config::Entry::Linux) => Entry::Linux,
        None if is_bzimage(&config.kernel).unwrap_or(false) => Entry::Linux,
        None => Entry::Pvh,
    };
    Image {
        kernel: config.kernel.clone(),
        initrd: config.initrd.clone(),
        command_line: config.cmdline.clone(),
        entry,
    }
}

fn is_bzimage(kernel: &Path) -> io::Result<bool> {
    let mut file = File::open(kernel)?;
    file.seek(SeekFrom::Start(BZIMAGE_MAGIC_OFFSET))?;
    let mut magic = [0; 4];
    file.read_exact(&mut magic)?;
    Ok(magic == BZIMAGE_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Arguments, String> {
        let words = words.iter().map(OsString::from);
        Arguments::parse(words).map_err(|error| error.to_string())
    }

    #[test]
    fn the_command_line_names_a_configuration_and_control_streams() {
        let both = parse(&["--control-fd", "1", "vm.json", "--control", "/run/vm"]).unwrap();
        assert_eq!(both.config, Path::new("vm.json"));
        assert!(both.control.stream.is_some());
        assert_eq!(both.control.path.as_deref(), Some(Path::new("/run/vm")));
        for (words, sentence) in [
            (&[][..], USAGE),
            (&["a", "b"], USAGE),
            (&["-x", "a"], USAGE),
            (&["a", "--control"], "--control needs a path"),
            (
                &["a", "--control-fd", "x"],
                "--control-fd needs the number of a descriptor",
            ),
        ] {
            assert_eq!(parse(words).unwrap_err(), sentence, "{words:?}");
        }
        let closed = parse(&["a", "--control-fd", "1000000"]).unwrap_err();
        assert!(
            closed.starts_with("descriptor 1000000 is not open: "),
            "{closed}"
        );
    }

    #[test]
    fn a_kernel_is_entered_as_its_kind_is() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("kernel");
        let mut bytes = vec![0; 0x300];
        std::fs::write(&file, &bytes).unwrap();
        let mut config = Config::new(&file);
        assert_eq!(image(&config).entry, Entry::Pvh);
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        std::fs::write(&file, &bytes).unwrap();
        assert_eq!(image(&config).entry, Entry::Linux);
        config.entry = Some(config::Entry::Pvh);
        assert_eq!(image(&config).entry, Entry::Pvh);
    }
}
