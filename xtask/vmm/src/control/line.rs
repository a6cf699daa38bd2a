//! One line of the control stream: a request, a response, an event.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::command::Command;

/// Bytes of the longest line that is read. A longer one ends its client: it is no line.
pub const LONGEST_LINE: usize = 64 << 10;

/// What a client says: a command, and an id that comes back with the answer.
#[derive(Clone, PartialEq, Debug)]
pub struct Request {
    /// The command.
    pub command: Command,
    /// The client's own; anything.
    pub id: Option<Value>,
}

/// A request as it is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    execute: String,
    #[serde(default)]
    arguments: Map<String, Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    id: Option<Value>,
}

impl Request {
    /// Reads a line, which must not hold its end. A response with the error is what the client gets otherwise.
    pub fn parse(line: &[u8]) -> Result<Self, Response> {
        let fail = |id: Option<Value>, failure| Response {
            id,
            result: Err(failure),
        };
        let value: Value = serde_json::from_slice(line).map_err(|error| {
            let desc = format!("this line is no JSON: {error}");
            fail(None, Failure::generic(desc))
        })?;
        let id = value.get("id").cloned();
        let written: Written = serde_json::from_value(value).map_err(|error| {
            let desc = format!("this is no command: {error}");
            fail(id.clone(), Failure::generic(desc))
        })?;
        match Command::parse(&written.execute, written.arguments) {
            Ok(command) => Ok(Self { command, id }),
            Err(failure) => Err(fail(id, failure)),
        }
    }

    /// As a line, its end included.
    ///
    /// # Errors
    /// When a path in it is no text.
    pub fn to_line(&self) -> serde_json::Result<String> {
        let Value::Object(arguments) = self.command.arguments()? else {
            unreachable!("arguments are structures")
        };
        let written = Written {
            execute: self.command.name().into(),
            arguments,
            id: self.id.clone(),
        };
        Ok(serde_json::to_string(&written)? + "\n")
    }
}

/// What came of a command.
#[derive(Clone, PartialEq, Debug)]
pub struct Response {
    /// That of the request.
    pub id: Option<Value>,
    /// What it returns, or why it failed.
    pub result: Result<Value, Failure>,
}

impl Response {
    /// As JSON.
    pub fn to_json(&self) -> Value {
        let mut line = match &self.result {
            Ok(value) => json!({ "return": value }),
            Err(failure) => json!({ "error": failure }),
        };
        if let (Some(id), Value::Object(line)) = (&self.id, &mut line) {
            line.insert("id".into(), id.clone());
        }
        line
    }
}

/// Why a command failed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{desc}")]
pub struct Failure {
    /// What sort of failure.
    pub class: Class,
    /// One sentence.
    pub desc: String,
}

/// What sort of failure, as QMP sorts them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Class {
    /// There is no such command.
    CommandNotFound,
    /// There is no such device.
    DeviceNotFound,
    /// The device cannot do it now.
    DeviceNotActive,
    /// Anything else.
    GenericError,
}

impl Failure {
    /// A failure of this class.
    pub fn new(class: Class, desc: impl fmt::Display) -> Self {
        let desc = desc.to_string();
        Self { class, desc }
    }

    /// A failure of no special class.
    pub fn generic(desc: impl fmt::Display) -> Self {
        Self::new(Class::GenericError, desc)
    }
}

/// The first line of the stream.
#[derive(Clone, Copy, Debug, Default)]
pub struct Greeting;

impl Greeting {
    /// As JSON.
    pub fn to_json(self) -> Value {
        let version = env!("CARGO_PKG_VERSION");
        json!({ "QMP": {
            "version": { "package": format!("enlit-vmm {version}") },
            "capabilities": [],
        } })
    }
}
