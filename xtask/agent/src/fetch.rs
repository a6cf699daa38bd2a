//! A file over TCP, timed by the one who fetches it: what the benchmarks of networks run at either end.
//!
//! `/init fetch ADDRESS:PORT /PATH` prints the bytes that came and the nanoseconds, from the connection to the last byte.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    time::Instant,
};

/// Bytes that are read at a time.
const PIECE: usize = 64 << 10;

/// How an answer with a file begins, behind the version of HTTP.
const FOUND: &[u8] = b" 200 ";

pub(crate) fn main(words: &[String]) -> io::Result<()> {
    let [address, path] = words else {
        return Err(io::Error::other("fetch ADDRESS:PORT /PATH"));
    };
    let start = Instant::now();
    let mut stream = TcpStream::connect(address.as_str())?;
    let bytes = fetch(&mut stream, path)?;
    println!("{bytes} {}", start.elapsed().as_nanos());
    Ok(())
}

/// Asks for a file; returns how many bytes the answer has.
fn fetch(stream: &mut (impl Read + Write), path: &str) -> io::Result<u64> {
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
    let mut piece = vec![0; PIECE];
    let mut begin = Vec::new();
    let mut bytes = 0;
    loop {
        let length = stream.read(&mut piece)?;
        if length == 0 {
            break;
        }
        let missing = 16_usize.saturating_sub(begin.len());
        begin.extend(piece.iter().take(length.min(missing)));
        bytes += length as u64;
    }
    if begin.windows(FOUND.len()).any(|part| part == FOUND) {
        Ok(bytes)
    } else {
        let begin = String::from_utf8_lossy(&begin).into_owned();
        Err(io::Error::other(format!("there is no {path}: {begin}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer, cut into pieces, and what was asked.
    struct Server(Vec<&'static [u8]>, Vec<u8>);

    impl Read for Server {
        fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
            if self.0.is_empty() {
                return Ok(0);
            }
            self.0.remove(0).read(to)
        }
    }

    impl Write for Server {
        fn write(&mut self, from: &[u8]) -> io::Result<usize> {
            self.1.extend_from_slice(from);
            Ok(from.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn all_bytes_of_an_answer_count() {
        let mut server = Server(vec![b"HTTP/1.0 2", b"00 OK\r\n\r\n", b"abc"], Vec::new());
        assert_eq!(fetch(&mut server, "/file").unwrap(), 22);
        assert_eq!(server.1, b"GET /file HTTP/1.0\r\n\r\n");
    }

    #[test]
    fn what_is_not_found_is_no_file() {
        let mut server = Server(vec![b"HTTP/1.0 404 Not Found\r\n\r\n"], Vec::new());
        assert!(fetch(&mut server, "/file").is_err());
        assert!(fetch(&mut Server(Vec::new(), Vec::new()), "/file").is_err());
    }
}
