//! The user's files in the agent's own machine: a FUSE file system whose requests
//! travel to the client, which answers them.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::fd::AsRawFd,
};

use rustix::{
    io::Errno,
    mount::{MountFlags, UnmountFlags, unmount},
};

use crate::streams::End;

/// Longest request or answer in bytes: a write or read of 1 MiB, which the kernel does
/// not exceed, and its header.
const MAX_MESSAGE: usize = (1 << 20) + 4096;

/// Mounts a new file system and gives its requests and answers.
pub(crate) fn mount(directory: &str) -> io::Result<End> {
    // What is mounted on a user's computer is not ours to decide.
    if std::process::id() != 1 {
        return Err(io::Error::other("the files are at hand without it"));
    }
    fs::create_dir_all(directory)?;
    let device: File = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")?;
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other\0",
        device.as_raw_fd()
    );
    let options =
        std::ffi::CStr::from_bytes_with_nul(options.as_bytes()).map_err(io::Error::other)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    rustix::mount::mount("enlit", directory, "fuse", flags, Some(options))?;
    let directory = directory.to_owned();
    Ok(End {
        reader: Box::new(Requests::new(device.try_clone()?)),
        writer: Box::new(Answers::new(device)),
        finish: Box::new(|| ()),
        // Programs that wait for a file get an error. It fails when it was unmounted already.
        abort: Box::new(move || {
            let _ = unmount(
                directory.as_str(),
                UnmountFlags::FORCE | UnmountFlags::DETACH,
            );
        }),
    })
}

/// The kernel's requests as one run of bytes. The kernel wants room for the longest one
/// in every read.
struct Requests<D> {
    device: D,
    buffer: Vec<u8>,
    given: usize,
    length: usize,
}

impl<D> Requests<D> {
    fn new(device: D) -> Self {
        Self {
            device,
            buffer: vec![0; MAX_MESSAGE],
            given: 0,
            length: 0,
        }
    }
}

impl<D: Read> Read for Requests<D> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        while self.given == self.length {
            match self.device.read(&mut self.buffer) {
                Ok(length) => (self.given, self.length) = (0, length),
                // The one who asked has gone; the next request, please.
                Err(error) if is(&error, Errno::NOENT) => continue,
                // Unmounted.
                Err(error) if is(&error, Errno::NODEV) => return Ok(0),
                Err(error) => return Err(error),
            }
            if self.length == 0 {
                return Ok(0);
            }
        }
        let rest = self.buffer.get(self.given..self.length).unwrap_or_default();
        let count = (&*rest).read(to)?;
        self.given += count;
        Ok(count)
    }
}

/// Answers cut out of a run of bytes by the length that each begins with: the kernel wants
/// each in one write.
struct Answers<D> {
    device: D,
    buffer: Vec<u8>,
}

impl<D> Answers<D> {
    fn new(device: D) -> Self {
        Self {
            device,
            buffer: Vec::new(),
        }
    }
}

impl<D: Write> Write for Answers<D> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(from);
        while let Some(length) = self.buffer.first_chunk::<4>() {
            let length = u32::from_le_bytes(*length) as usize;
            if !(16..=MAX_MESSAGE).contains(&length) {
                return Err(io::Error::from(io::ErrorKind::InvalidData));
            }
            let Some(answer) = self.buffer.get(..length) else {
                break;
            };
            match self.device.write(answer) {
                // The one who asked has gone.
                Err(error) if is(&error, Errno::NOENT) => {}
                Err(error) => return Err(error),
                Ok(_) => {}
            }
            self.buffer.drain(..length);
        }
        Ok(from.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    /// Gives each request in one read, as the kernel does.
    struct Kernel(std::vec::IntoIter<Vec<u8>>);

    impl Read for Kernel {
        fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
            assert!(to.len() >= MAX_MESSAGE, "no room for the longest request");
            match self.0.next() {
                Some(request) => (&*request).read(to),
                None => Err(Errno::NODEV.into()),
            }
        }
    }

    /// Notes each write.
    #[derive(Default)]
    struct Writes(Vec<Vec<u8>>);

    impl Write for Writes {
        fn write(&mut self, from: &[u8]) -> io::Result<usize> {
            self.0.push(from.to_vec());
            Ok(from.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn message(body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + 16).unwrap();
        [&length.to_le_bytes()[..], &[0; 12], body].concat()
    }

    proptest! {
        #[test]
        fn requests_become_one_run_of_bytes(
            requests in vec(vec(any::<u8>(), 1..300), 0..8),
            piece in 1..400_usize,
        ) {
            let whole = requests.concat();
            let mut reader = Requests::new(Kernel(requests.into_iter()));
            let (mut got, mut buffer) = (Vec::new(), vec![0; piece]);
            while let Ok(length @ 1..) = reader.read(&mut buffer) {
                got.extend_from_slice(&buffer[..length]);
            }
            prop_assert_eq!(got, whole);
        }

        #[test]
        fn each_answer_is_one_write_however_it_came(
            bodies in vec(vec(any::<u8>(), 0..300), 0..8),
            piece in 1..400_usize,
        ) {
            let answers: Vec<_> = bodies.iter().map(|body| message(body)).collect();
            let mut writer = Answers::new(Writes::default());
            for piece in answers.concat().chunks(piece) {
                writer.write_all(piece).unwrap();
            }
            prop_assert_eq!(writer.device.0, answers);
        }

        #[test]
        fn answers_of_no_possible_length_end_the_stream(length in prop_oneof![
            0..16_u32,
            MAX_MESSAGE as u32 + 1..,
        ]) {
            let mut writer = Answers::new(Writes::default());
            prop_assert!(writer.write_all(&length.to_le_bytes()).is_err());
        }
    }
}
