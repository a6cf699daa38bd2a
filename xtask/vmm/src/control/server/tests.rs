//! The control stream over real sockets.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use vmbus_host::bus::Profile;

use super::{Ends, ListenError, Server};
use crate::control::{Event, LONGEST_LINE, Reason};
use crate::devices::Devices;
use crate::runner::{Events, Runner};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

fn runner() -> Arc<Runner> {
    let events = Events::new().unwrap();
    Runner::new(Profile::test_machine(), Devices::default(), events).unwrap()
}

fn at(path: &Path) -> Ends {
    Ends {
        stream: None,
        path: Some(path.to_owned()),
    }
}

struct Client(BufReader<UnixStream>);

impl Client {
    fn of(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut client = Self(BufReader::new(stream));
        let greeting = client.read().unwrap();
        assert!(greeting["QMP"]["version"].is_object(), "{greeting}");
        client
    }

    fn connect(path: &Path) -> Self {
        Self::of(UnixStream::connect(path).unwrap())
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).unwrap();
    }

    /// The next line; none at the end.
    fn read(&mut self) -> Option<Value> {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        (!line.is_empty()).then(|| serde_json::from_str(&line).unwrap())
    }

    fn ask(&mut self, line: &str) -> Value {
        self.write(line.as_bytes());
        self.write(b"\n");
        self.read().unwrap()
    }
}

#[test]
fn several_clients_are_answered_each_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control");
    let (stream, far) = UnixStream::pair().unwrap();
    let ends = Ends {
        stream: Some(OwnedFd::from(stream)),
        path: Some(path.clone()),
    };
    let _server = Server::start(ends, runner()).unwrap();
    let mut clients = [
        Client::of(far),
        Client::connect(&path),
        Client::connect(&path),
    ];
    for (number, client) in clients.iter_mut().enumerate() {
        let line = json!({ "execute": "qmp_capabilities", "arguments": {}, "id": number });
        assert_eq!(
            client.ask(&line.to_string()),
            json!({ "return": {}, "id": number })
        );
    }
    let status = clients[1].ask(r#"{"execute":"query-status"}"#);
    assert_eq!(status["return"]["status"], "prelaunch");
    let unknown = clients[2].ask(r#"{"execute":"fly","id":"x"}"#);
    assert_eq!(
        unknown,
        json!({ "error": { "class": "CommandNotFound", "desc": "there is no command `fly`" },
                "id": "x" })
    );
}

#[test]
fn commands_of_one_piece_are_answered_in_their_order() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control");
    let _server = Server::start(at(&path), runner()).unwrap();
    let mut client = Client::connect(&path);
    let lines: String = (0..1000)
        .map(|number| format!("{{\"execute\":\"query-status\",\"id\":{number}}}\r\n\n"))
        .collect();
    client.write(lines.as_bytes());
    for number in 0..1000 {
        assert_eq!(client.read().unwrap()["id"], number);
    }
}

#[test]
fn events_come_to_every_client_and_the_last_words_before_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control");
    let runner = runner();
    let server = Server::start(at(&path), runner.clone()).unwrap();
    let mut clients = [Client::connect(&path), Client::connect(&path)];
    runner.events().push(Event::VmbusDisconnected {});
    for client in &mut clients {
        assert_eq!(client.read().unwrap()["event"], "VMBUS_DISCONNECTED");
    }
    runner.events().push(Event::Shutdown {
        guest: true,
        reason: Reason::GuestShutdown,
    });
    drop(server);
    for client in &mut clients {
        let event = client.read().unwrap();
        assert_eq!(
            event["data"],
            json!({ "guest": true, "reason": "guest-shutdown" })
        );
        assert_eq!(client.read(), None);
    }
    assert!(!path.exists());
}

#[test]
fn quit_is_answered_before_the_machine_ends() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control");
    let runner = runner();
    let _server = Server::start(at(&path), runner.clone()).unwrap();
    let mut client = Client::connect(&path);
    assert_eq!(client.ask(r#"{"execute":"quit"}"#), json!({ "return": {} }));
    assert_eq!(runner.serve().unwrap(), crate::runner::End::Quit);
}

#[test]
fn who_says_no_more_hears_the_answer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control");
    let _server = Server::start(at(&path), runner()).unwrap();
    let mut client = Client::connect(&path);
    client.write(b"{\"execute\":\"query-status\"}\n");
    let stream = client.0.get_ref();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(client.read().unwrap()["return"].is_object());
    assert_eq!(client.read(), None);
}

#[test]
fn a_line_without_an_end_ends_its_client_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control");
    let _server = Server::start(at(&path), runner()).unwrap();
    let (mut bad, mut good) = (Client::connect(&path), Client::connect(&path));
    bad.write(&vec![b'x'; LONGEST_LINE + 1]);
    let answer = bad.read().unwrap();
    assert_eq!(answer["error"]["desc"], "a line is longer than 65536 bytes");
    assert_eq!(bad.read(), None);
    assert!(good.ask(r#"{"execute":"query-status"}"#)["return"].is_object());
}

#[test]
fn who_does_not_read_is_cut_off_and_keeps_nobody_waiting() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control");
    let _server = Server::start(at(&path), runner()).unwrap();
    let (mut deaf, mut good) = (Client::connect(&path), Client::connect(&path));
    // Until the machine has had enough of it.
    let request = "{\"execute\":\"none\",\"id\":\"".to_owned() + &"x".repeat(30_000) + "\"}\n";
    let deaf_stream = deaf.0.get_mut();
    deaf_stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let mut sent = 0;
    while deaf_stream.write_all(request.as_bytes()).is_ok() {
        sent += request.len();
        assert!(sent < 1 << 30, "it is read for ever");
    }
    assert!(good.ask(r#"{"execute":"query-status"}"#)["return"].is_object());
    let mut rest = Vec::new();
    // What was written before, and then the end.
    let _ = deaf.0.read_to_end(&mut rest);
    assert!(good.ask(r#"{"execute":"query-status"}"#)["return"].is_object());
}

#[test]
fn events_pass_by_who_does_not_read_them_and_milestones_do_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control");
    let runner = runner();
    let _server = Server::start(at(&path), runner.clone()).unwrap();
    let (mut slow, mut quick) = (Client::connect(&path), Client::connect(&path));
    // As a guest makes them that connects and goes all the time.
    const AT_ONCE: usize = 1000;
    const EVENTS: usize = 60 * AT_ONCE;
    let mut bytes = 0;
    for _ in 0..EVENTS / AT_ONCE {
        for _ in 0..AT_ONCE {
            runner.events().push(Event::VmbusDisconnected {});
        }
        for _ in 0..AT_ONCE {
            let event = quick.read().unwrap();
            assert_eq!(event["event"], "VMBUS_DISCONNECTED");
            bytes += event.to_string().len();
        }
    }
    assert!(bytes > 4 << 20, "more than may wait for anybody: {bytes}");
    runner.events().push(Event::Shutdown {
        guest: true,
        reason: Reason::GuestShutdown,
    });
    assert_eq!(quick.read().unwrap()["event"], "SHUTDOWN");
    let (mut heard, mut milestone, mut lost) = (0, false, 0);
    while !milestone || heard + lost < EVENTS {
        let event = slow.read().expect("it is not cut off");
        match event["event"].as_str() {
            Some("VMBUS_DISCONNECTED") => heard += 1,
            Some("EVENTS_LOST") => {
                lost += event["data"]["count"].as_u64().unwrap() as usize;
            }
            other => milestone = other == Some("SHUTDOWN"),
        }
    }
    assert_eq!(heard + lost, EVENTS);
    assert_ne!(lost, 0);
}

#[test]
fn a_socket_in_use_is_told_and_one_left_behind_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control");
    let first = Server::start(at(&path), runner()).unwrap();
    let error = Server::start(at(&path), runner()).unwrap_err();
    assert!(matches!(error, ListenError::InUse { .. }), "{error}");
    assert_eq!(
        error.to_string(),
        format!(
            "the control socket {} is in use: another machine listens there",
            path.display()
        )
    );
    drop(first);
    // As one does that was killed.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    drop(Server::start(at(&path), runner()).unwrap());
    std::fs::write(&path, "a letter").unwrap();
    let error = Server::start(at(&path), runner()).unwrap_err();
    assert!(matches!(error, ListenError::NoSocket { .. }), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"a letter");
}
