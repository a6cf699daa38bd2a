//! Sockets of the guest as Unix sockets of the host (spec hvsock.md 8), with real sockets and a thread that waits for them.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmbus_host::bus::Profile;
use vmbus_host::hvsocket::{Limits, Service, SocketsHandle, unix};

use crate::hvsocket::{Socket, bytes, offered_endpoint, request};
use crate::support::{SECOND, Vm};

/// How long something may take that happens at once.
const PATIENCE: Duration = Duration::from_secs(60);

struct Setup {
    vm: Vm,
    handle: SocketsHandle,
    path: PathBuf,
    /// The host has been woken.
    woken: Receiver<()>,
    _folder: tempfile::TempDir,
}

impl Setup {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock");
        let vm = Vm::new(Profile::hyper_v());
        let sockets = unix::bind(&path, Limits::default()).unwrap();
        let handle = sockets.handle();
        let (sender, woken) = channel();
        let sender = Mutex::new(sender);
        vm.machine.host(|host| {
            host.on_wish(Arc::new(move || {
                let _ = sender.lock().unwrap().send(());
            }));
            host.set_connector(sockets);
        });
        vm.connect();
        Self {
            vm,
            handle,
            path,
            woken,
            _folder: folder,
        }
    }

    /// Lets the machine run whenever the host is woken, until something is so.
    fn until<T>(&self, mut found: impl FnMut() -> Option<T>) -> T {
        loop {
            self.vm.machine.settle();
            if let Some(found) = found() {
                return found;
            }
            self.woken
                .recv_timeout(PATIENCE)
                .expect("the host is woken");
        }
    }

    fn listen(&self, name: &str) -> UnixListener {
        let path = format!("{}_{name}", self.path.display());
        UnixListener::bind(path).unwrap()
    }

    /// A program's connection to the guest, after its first line.
    fn call(&self, line: &str) -> UnixStream {
        let mut stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        stream
    }
}

/// Everything up to a line feed.
fn line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte).unwrap() == 1 {
        line.push(byte[0]);
        if byte == *b"\n" {
            break;
        }
    }
    String::from_utf8(line).unwrap()
}

#[test]
fn a_guest_reaches_a_program_by_port_or_guid_in_this_order() {
    let service = Service::port(5000);
    for names in [
        &["5000"][..],
        &["00001388-facb-11e6-bd58-64006a7986d3"],
        &["5000", "00001388-facb-11e6-bd58-64006a7986d3"],
    ] {
        let setup = Setup::new();
        let listeners: Vec<_> = names.iter().map(|name| setup.listen(name)).collect();
        let endpoint = Service::port(1).0;
        let socket = Socket::new(&setup.vm, service.0, endpoint, 6);
        request(&setup.vm, service.0, endpoint);
        let (mut program, _) = listeners[0].accept().unwrap();
        assert!(socket.is_open());
        socket.send(b"hello\n");
        setup.vm.machine.settle();
        assert_eq!(line(&mut program), "hello\n");
        program.write_all(b"welcome").unwrap();
        setup.until(|| (socket.seen_bytes() == b"welcome").then_some(()));
    }
}

#[test]
fn a_port_that_nobody_listens_on_is_refused() {
    let setup = Setup::new();
    request(&setup.vm, Service::port(1).0, Service::port(2).0);
    assert_eq!(setup.handle.counts().refused, 1);
    // A socket whose program is gone is one that nobody listens on.
    drop(setup.listen("1"));
    request(&setup.vm, Service::port(1).0, Service::port(2).0);
    assert_eq!(setup.handle.counts().refused, 2);
}

#[test]
fn a_program_reaches_the_guest_by_the_text_protocol() {
    for asked in ["5000", "00001388-facb-11e6-bd58-64006a7986d3"] {
        let setup = Setup::new();
        let mut program = setup.call(&format!("CONNECT {asked}\nfirst "));
        let endpoint = setup.until(|| offered_endpoint(&setup.vm));
        let service = Service::port(5000);
        let socket = Socket::new(&setup.vm, service.0, endpoint, 6);
        setup.vm.machine.settle();
        let port = Service(endpoint).port_number().unwrap();
        assert_eq!(line(&mut program), format!("OK {port}\n"));
        program.write_all(b"second").unwrap();
        setup.until(|| (socket.seen_bytes() == b"first second").then_some(()));
        socket.send(b"answer\n");
        setup.vm.machine.settle();
        assert_eq!(line(&mut program), "answer\n");
    }
}

#[test]
fn a_program_is_hung_up_on_when_the_guest_does_not_open() {
    let setup = Setup::new();
    let mut program = setup.call("CONNECT 5000\n");
    setup.until(|| offered_endpoint(&setup.vm));
    setup.vm.machine.advance(6 * SECOND);
    assert_eq!(line(&mut program), "");
    assert_eq!(setup.handle.counts().expired, 1);
}

#[test]
fn a_program_that_does_not_speak_the_protocol_is_hung_up_on() {
    let setup = Setup::new();
    for odd in ["HELLO\n", "CONNECT x\n", &"C".repeat(100)] {
        let mut program = setup.call(odd);
        let mut rest = Vec::new();
        // What it sent may lie unread when it is hung up on.
        match program.read_to_end(&mut rest) {
            Ok(_) => assert_eq!(rest, []),
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        }
    }
    assert_eq!(setup.handle.counts().from_host, 0);
}

#[test]
fn megabytes_go_both_ways_with_half_closes() {
    let setup = Setup::new();
    let listener = setup.listen("5000");
    let endpoint = Service::port(1).0;
    let socket = Socket::new(&setup.vm, Service::port(5000).0, endpoint, 6);
    request(&setup.vm, Service::port(5000).0, endpoint);
    let (mut program, _) = listener.accept().unwrap();
    let data = bytes(2 << 20);
    let expected = data.clone();
    // A program that sends everything back when it has had all of it.
    let echo = std::thread::spawn(move || {
        let mut all = Vec::new();
        program.read_to_end(&mut all).unwrap();
        assert!(all == expected);
        program.write_all(&all).unwrap();
        program.shutdown(Shutdown::Write).unwrap();
    });
    let mut sent = 0;
    setup.until(|| {
        sent += socket.send(&data[sent..]);
        (sent == data.len()).then_some(())
    });
    setup.until(|| socket.try_finish().then_some(()));
    setup.until(|| socket.ended().then_some(()));
    assert!(socket.seen_bytes() == data);
    echo.join().unwrap();
    setup.vm.machine.advance(SECOND);
    assert!(!socket.is_open(), "both have finished");
    assert_eq!(setup.handle.complaints(), [] as [&str; 0]);
}

#[test]
fn the_path_is_free_again_afterwards_and_refused_while_in_use() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vsock");
    let first = unix::bind(&path, Limits::default()).unwrap();
    let error = unix::bind(&path, Limits::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("the socket {} is in use by another program", path.display())
    );
    drop(first);
    assert!(!path.exists());
    // A socket that a program left behind.
    drop(UnixListener::bind(&path).unwrap());
    drop(unix::bind(&path, Limits::default()).unwrap());
    std::fs::write(&path, b"mine").unwrap();
    let error = unix::bind(&path, Limits::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("{} is there already, and is no socket", path.display())
    );
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
}
