//! Shows the machine, then stays up and answers the host.

#![no_std]
#![no_main]

enlit::main!(main, requires = [enlit::Device::Balloon]);

async fn main(_machine: enlit::Machine) {
    enlit::println!("hello");
}
