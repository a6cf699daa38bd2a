//! Writes frames to a file that every packet analyser reads (libpcap's format, version 2.4, with microseconds).

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use super::nic::{Capture, Direction};

/// The most bytes of a frame that are written.
const SNAP: u32 = 256 << 10;

/// Ethernet.
const LINK_TYPE: u32 = 1;

/// The file.
pub struct Pcap<W: Write = BufWriter<File>> {
    output: W,
    /// The first error ends the writing: a disk that is full shall not end the network.
    error: Option<io::Error>,
}

impl Pcap {
    /// Makes the file, or empties it.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn create(path: &Path) -> io::Result<Self> {
        Self::new(BufWriter::new(File::create(path)?))
    }
}

impl<W: Write> Pcap<W> {
    /// Writes to `output` from now on.
    ///
    /// # Errors
    ///
    /// Those of `output`.
    pub fn new(mut output: W) -> io::Result<Self> {
        let mut header = 0xA1B2_C3D4_u32.to_le_bytes().to_vec();
        header.extend_from_slice(&[2, 0, 4, 0]);
        // The zone and the accuracy of the clock; nobody fills them in.
        header.extend_from_slice(&[0; 8]);
        header.extend_from_slice(&SNAP.to_le_bytes());
        header.extend_from_slice(&LINK_TYPE.to_le_bytes());
        output.write_all(&header)?;
        output.flush()?;
        Ok(Self {
            output,
            error: None,
        })
    }

    /// Why nothing is written any more.
    pub fn error(&self) -> Option<&io::Error> {
        self.error.as_ref()
    }

    fn try_write(&mut self, frame: &[u8]) -> io::Result<()> {
        let time = SystemTime::now().duration_since(UNIX_EPOCH);
        let time = time.unwrap_or_default();
        // The format ends in 2106.
        let seconds = (time.as_secs() & 0xFFFF_FFFF) as u32;
        let length = u32::try_from(frame.len()).unwrap_or(u32::MAX);
        let kept = frame.get(..SNAP as usize).unwrap_or(frame);
        for field in [seconds, time.subsec_micros(), length.min(SNAP), length] {
            self.output.write_all(&field.to_le_bytes())?;
        }
        self.output.write_all(kept)
    }
}

impl<W: Write + Send> Capture for Pcap<W> {
    fn frame(&mut self, _direction: Direction, frame: &[u8]) {
        if self.error.is_none() {
            self.error = self.try_write(frame).err();
        }
    }

    fn flush(&mut self) {
        if self.error.is_none() {
            self.error = self.output.flush().err();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    fn word(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(*bytes[at..].first_chunk().unwrap())
    }

    #[test]
    fn the_file_is_what_libpcap_reads() {
        let mut file = Vec::new();
        let mut pcap = Pcap::new(&mut file).unwrap();
        pcap.frame(Direction::Sent, b"first frame");
        pcap.frame(Direction::Received, &[7; 300 << 10]);
        pcap.flush();
        assert!(pcap.error().is_none());
        assert_eq!(word(&file, 0), 0xA1B2_C3D4);
        assert_eq!((word(&file, 16), word(&file, 20)), (SNAP, LINK_TYPE));
        assert_eq!((word(&file, 32), word(&file, 36)), (11, 11));
        assert_eq!(&file[40..51], b"first frame");
        assert_eq!((word(&file, 59), word(&file, 63)), (SNAP, 300 << 10));
        assert_eq!(file.len(), 67 + SNAP as usize);
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs();
        assert!(now - u64::from(word(&file, 24)) < 60);
    }

    #[test]
    fn a_full_disk_ends_the_writing_and_nothing_else() {
        struct Full(usize);
        impl Write for Full {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0 = self
                    .0
                    .checked_sub(bytes.len())
                    .ok_or(io::ErrorKind::StorageFull)?;
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut pcap = Pcap::new(Full(30)).unwrap();
        pcap.frame(Direction::Sent, b"frame");
        pcap.frame(Direction::Sent, b"frame");
        let kind = pcap.error().map(io::Error::kind);
        assert_eq!(kind, Some(io::ErrorKind::StorageFull));
    }
}
