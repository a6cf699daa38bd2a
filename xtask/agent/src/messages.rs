//! FUSE's messages in a stream of bytes, and out of it again: each begins with its length,
//! little-endian, and is read and written in one call where it comes from and goes to.

use std::io::{self, Read, Write};

/// Longest message in bytes: a write or read of 1 MiB, which the kernel does not exceed,
/// and its header.
pub const MAX_MESSAGE: usize = (1 << 20) + 4096;

/// Shortest message: the header of an answer.
const MIN_MESSAGE: usize = 16;

/// Messages as one run of bytes. Each read of the source has room for the longest one.
pub struct Whole<D> {
    source: D,
    buffer: Vec<u8>,
    given: usize,
    length: usize,
}

impl<D> Whole<D> {
    /// Reads from `source`.
    pub fn new(source: D) -> Self {
        Self {
            source,
            buffer: vec![0; MAX_MESSAGE],
            given: 0,
            length: 0,
        }
    }
}

impl<D: Read> Read for Whole<D> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        if self.given == self.length {
            (self.given, self.length) = (0, self.source.read(&mut self.buffer)?);
        }
        let rest = self.buffer.get(self.given..self.length).unwrap_or_default();
        let count = (&*rest).read(to)?;
        self.given += count;
        Ok(count)
    }
}

/// Messages cut out of a run of bytes. Each is one write.
pub struct Cut<D> {
    sink: D,
    buffer: Vec<u8>,
}

impl<D> Cut<D> {
    /// Writes to `sink`.
    pub fn new(sink: D) -> Self {
        Self {
            sink,
            buffer: Vec::new(),
        }
    }
}

impl<D: Write> Write for Cut<D> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(from);
        while let Some(length) = self.buffer.first_chunk::<4>() {
            let length = u32::from_le_bytes(*length) as usize;
            if !(MIN_MESSAGE..=MAX_MESSAGE).contains(&length) {
                return Err(io::Error::from(io::ErrorKind::InvalidData));
            }
            let Some(message) = self.buffer.get(..length) else {
                break;
            };
            if self.sink.write(message)? != length {
                return Err(io::Error::from(io::ErrorKind::WriteZero));
            }
            self.buffer.drain(..length);
        }
        Ok(from.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    /// Gives each message in one read, as the kernel does.
    struct Kernel(std::vec::IntoIter<Vec<u8>>);

    impl Read for Kernel {
        fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
            assert!(to.len() >= MAX_MESSAGE, "no room for the longest request");
            match self.0.next() {
                Some(request) => (&*request).read(to),
                None => Ok(0),
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
            let mut reader = Whole::new(Kernel(requests.into_iter()));
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
            let mut writer = Cut::new(Writes::default());
            for piece in answers.concat().chunks(piece) {
                writer.write_all(piece).unwrap();
            }
            prop_assert_eq!(writer.sink.0, answers);
        }

        #[test]
        fn answers_of_no_possible_length_end_the_stream(length in prop_oneof![
            0..16_u32,
            MAX_MESSAGE as u32 + 1..,
        ]) {
            let mut writer = Cut::new(Writes::default());
            prop_assert!(writer.write_all(&length.to_le_bytes()).is_err());
        }
    }
}
